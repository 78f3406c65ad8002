/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Peers that do not keep to the rules: handshakes that stop anywhere, another wire version; shm:
 * memory that could shrink, and a peer that writes what it likes where both can write; tcp: records
 * that cannot be, bytes one by one, and readers that do not read.
 */
#include "transport_rig.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <netinet/in.h>

#include "../../lib/transport/hello.h"
#include "../../lib/transport/pair.h"
#include "../../lib/transport/net.h"
#include "../../lib/transport/tcp.h"

static bool is_tcp(void)
{
	return !strcmp(rig_scheme(), "tcp");
}

static void make_hello(struct afd__hello *hello, uint32_t kind)
{
	static const uint8_t kinds[LAYERS] = { AFD_FFN_DENSE, AFD_FFN_DENSE, AFD_FFN_DENSE };
	struct afd_contract contract = rig_contract;

	memset(hello, 0, sizeof(*hello));
	hello->kind = kind;
	contract.ffn_kinds = kinds;
	contract.router = AFD_ROUTER_NONE;
	contract.activation = AFD_ACTIVATION_SILU;
	afd__hello_state(hello, &contract);
	hello->role = kind == AFD__WELCOME ? AFD_ROLE_FFN : AFD_ROLE_ATTENTION;
	hello->lanes = 1;
	hello->max_rows = 4;
	hello->to_ffn_dtype = hello->to_attention_dtype = AFD_DTYPE_F32;
	hello->gate = AFD_GATE_ATTENTION;
	hello->n_held = LAYERS;
	hello->map_version = AFD__MAP_VERSION;
	hello->n_shards = hello->n_tp = 1;
}

static void bind_stranger(struct afd__wire *wire)
{
	struct afd__wire_slots slots = {
		.n_slots = 6, .n_control = 4, .control_bytes = 512, .slot_bytes = 1024
	};

	rig_bind(wire, &slots);
}

/* Goes as far as `phase` and leaves: 0 connects, 1 says hello, 2 hears the welcome, 3 has the
 * slots, 4 is joined. */
static void leave_in_phase(const char *address, int epoll_fd, int phase)
{
	static struct afd__hello hello;
	struct afd__wire wire;

	rig_connect(&wire, epoll_fd, address);
	make_hello(&hello, AFD__HELLO);
	if (phase > 0)
		rig_say(&wire, &hello);
	if (phase > 1)
		assert_int_equal(rig_hear(&wire, &hello), 0);
	if (phase > 2)
		bind_stranger(&wire);
	hello.kind = AFD__READY;
	if (phase > 3)
		rig_say(&wire, &hello);
	wire.ops->close(&wire);
}

static void a_client_that_leaves_in_any_phase_of_the_handshake_leaves_nothing_behind(void **state)
{
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC), before = count_descriptors(), alone;
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	alone = count_descriptors();
	for (int i = 0; i < 50; i++)
		leave_in_phase(server.address, epoll_fd, i % 5);
	net = join(&server, NULL);
	run_step(net, 3, 1);
	afd_transport_destroy(net);
	expect_descriptors(alone);
	server_stop(&server);
	assert_int_equal(count_descriptors(), before);
	close(epoll_fd);
}

static void another_wire_version_is_refused_by_both_values(void **state)
{
	static struct afd__hello hello;
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	struct server server;
	struct afd__wire wire;

	server_start(&server, NULL);
	rig_connect(&wire, epoll_fd, server.address);
	make_hello(&hello, AFD__HELLO);
	hello.wire_version = 2;
	rig_say(&wire, &hello);
	assert_int_equal(rig_hear(&wire, &hello), 0);
	assert_int_equal(hello.kind, AFD__REFUSAL);
	assert_string_equal(hello.field, "wire_version");
	assert_string_equal(hello.refuser_value, "1");
	assert_string_equal(hello.refused_value, "2");
	rig_wait_logged("wire_version is 2 there, 1 here");
	wire.ops->close(&wire);
	server_stop(&server);
	close(epoll_fd);
}

/* ---- peers that do not keep to the rules ---- */

static void a_peer_that_scribbles_in_the_memory_loses_its_own_link_only(void **state)
{
	static struct afd__hello hello;
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	struct server server;
	struct afd__wire wire;
	afd_transport *net;

	if (is_tcp())
		rig_skip("it is about memory that shm: shares");
	server_start(&server, NULL);
	net = join(&server, NULL);
	for (unsigned seed = 1; seed <= 60; seed++) {
		uint64_t *memory, random = seed * UINT64_C(0x9e3779b97f4a7c15);

		rig_connect(&wire, epoll_fd, server.address);
		make_hello(&hello, AFD__HELLO);
		rig_say(&wire, &hello);
		assert_int_equal(rig_hear(&wire, &hello), 0);
		bind_stranger(&wire);
		hello.kind = AFD__READY;
		rig_say(&wire, &hello);
		memory = (uint64_t *)pair_of(&wire)->end.memory;
		for (int i = 0; i < 400; i++) {
			random = random * UINT64_C(6364136223846793005) + 1442695040888963407u;
			/* Mostly in the rings' first entries, which are looked at next. */
			atomic_store((_Atomic uint64_t *)&memory[random >> 40 & 0x7ff],
				seed % 2 ? (1 + i % 3) << 16 | (random >> 20 & 15) : random);
		}
		eventfd_write(pair_of(&wire)->peer_bell, 1);
		run_step(net, 3, (int)seed);
		wire.ops->close(&wire);
	}
	run_step(net, 3, 1);
	assert_true(rig_logged("peer lost"));
	afd_transport_destroy(net);
	server_stop(&server);
	close(epoll_fd);
}

static int listen_at_port(const char *address)
{
	struct sockaddr_in v4 = { .sin_family = AF_INET,
		.sin_port = htons((uint16_t)atoi(strrchr(address, ':') + 1)),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	assert_int_equal(bind(fd, (struct sockaddr *)&v4, sizeof(v4)), 0);
	assert_int_equal(listen(fd, 8), 0);
	return fd;
}

static int listen_at_name(const char *address)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	int bytes = snprintf(sun.sun_path + 1, sizeof(sun.sun_path) - 1, "afd-%u-%s",
		(unsigned)geteuid(), strchr(address, ':') + 1);

	assert_int_equal(
		bind(fd, (struct sockaddr *)&sun,
			(socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)bytes)),
		0);
	assert_int_equal(listen(fd, 8), 0);
	return fd;
}

static int listen_raw(const char *address)
{
	return is_tcp() ? listen_at_port(address) : listen_at_name(address);
}

/* A server that welcomes and then hands over memory of this size and these seals. */
static void expect_memory_refused(off_t wrong_bytes, int seals, const char *text)
{
	struct {
		char magic[8];
		uint64_t bytes;
	} attach = { .magic = "AFDSHM1" };
	struct afd__wire_slots slots = {
		.n_slots = 6, .n_control = 4, .control_bytes = 512, .slot_bytes = 1024
	};
	uint8_t message[AFD__HELLO_MAX];
	static struct afd__hello hello;
	int fds[3], listener, peer;
	size_t slot_bytes;
	char address[96];
	afd_transport *net;

	rig_address(address);
	listener = listen_raw(address);
	net = make_client(address, &(struct afd_transport_params){ .max_rows = 4 });
	assert_int_equal(afd_transport_poll(net), 0);
	peer = accept(listener, NULL, NULL);
	assert_true(recv(peer, message, sizeof(message), 0) > 0);
	make_hello(&hello, AFD__WELCOME);
	assert_true(
		send(peer, message, afd__hello_encode(message, sizeof(message), &hello), 0) > 0);
	assert_int_equal(afd__segment_bytes(&slots, &slot_bytes), 0);
	fds[0] = memfd_create("afd-test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	assert_int_equal(ftruncate(fds[0], (off_t)slot_bytes + wrong_bytes), 0);
	assert_int_equal(fcntl(fds[0], F_ADD_SEALS, seals), 0);
	assert_int_equal(afd__pair_bell(&fds[1]), 0);
	assert_int_equal(afd__pair_bell(&fds[2]), 0);
	attach.bytes = slot_bytes;
	assert_int_equal(afd__socket_send_fds(peer, &attach, sizeof(attach), fds, 3), 1);
	expect_error(afd_transport_wait(net, 2000), -EPROTO, text);
	afd_transport_destroy(net);
	for (int i = 0; i < 3; i++)
		close(fds[i]);
	close(peer);
	close(listener);
}

static void memory_that_could_shrink_or_is_too_small_is_refused(void **state)
{
	int before = count_descriptors();

	if (is_tcp())
		rig_skip("it is about memory that shm: shares");
	expect_memory_refused(0, F_SEAL_GROW, "has seals 0x4, must have 0x6");
	expect_memory_refused(0, F_SEAL_SHRINK, "has seals 0x2, must have 0x6");
	expect_memory_refused(-4096, F_SEAL_GROW | F_SEAL_SHRINK, "the peer's memory has");
	assert_int_equal(count_descriptors(), before);
}

static void a_server_that_hangs_up_is_tried_again_until_a_real_one_comes(void **state)
{
	char address[96];
	afd_transport *net;
	int listener, peer;
	struct server server;

	rig_address(address);
	listener = listen_raw(address);
	net = make_client(address, NULL);
	for (int i = 0; i < 3; i++) {
		while (fcntl(listener, F_SETFL, O_NONBLOCK),
			(peer = accept(listener, NULL, NULL)) < 0) {
			assert_int_equal(afd_transport_poll(net), 0);
			sleep_ms(2);
		}
		close(peer);
	}
	close(listener);
	server_start_at(&server, address, NULL);
	assert_int_equal(afd_transport_wait(net, 0), 1);
	run_step(net, 2, 1);
	afd_transport_destroy(net);
	server_stop(&server);
}

/* ---- tcp: a stream of anything ---- */

/* A stranger that has joined, and its socket. */
static int join_stranger(struct afd__wire *wire, int epoll_fd, const char *address)
{
	static struct afd__hello hello;

	rig_connect(wire, epoll_fd, address);
	make_hello(&hello, AFD__HELLO);
	rig_say(wire, &hello);
	assert_int_equal(rig_hear(wire, &hello), 0);
	bind_stranger(wire);
	hello.kind = AFD__READY;
	rig_say(wire, &hello);
	return tcp_of(wire)->fd;
}

struct bad_record {
	uint16_t kind, slot;
	uint32_t bytes;
	const char *text;
};

static void records_that_cannot_be_end_their_own_link_only(void **state)
{
	static const struct bad_record cases[] = {
		{ 0, 0, 0, "a record of kind 0 with 0 bytes" },
		{ 3, 0, 0, "a record of kind 3" },
		{ 1, 6, 64, "the peer sent slot 6, which it did not have" },
		{ 1, 65535, 64, "the peer sent slot 65535" },
		{ 1, 0, 513, "the peer sent 513 bytes in slot 0, limit 512" },
		{ 1, 4, UINT32_MAX, "the peer sent 4294967295 bytes in slot 4, limit 1024" },
		{ 1, 4, 0, "the peer sent 0 bytes in slot 4" },
		{ 2, 0, 0, "the peer gave back slot 0, which it did not hold" },
		{ 2, 65535, 0, "the peer gave back slot 65535, which it did not hold" },
		{ 2, 0, 1, "a record of kind 2 with 1 bytes" },
	};
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	struct server server;
	afd_transport *net;

	if (!is_tcp())
		rig_skip("it is about the stream of tcp:");
	server_start(&server, NULL);
	net = join(&server, NULL);
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct afd__wire wire;
		int fd = join_stranger(&wire, epoll_fd, server.address);

		assert_int_equal(send(fd, &cases[i], TCP_RECORD_BYTES, MSG_NOSIGNAL),
			TCP_RECORD_BYTES);
		rig_wait_logged(cases[i].text);
		run_step(net, 3, (int)i);
		wire.ops->close(&wire);
	}
	afd_transport_destroy(net);
	server_stop(&server);
	close(epoll_fd);
}

static void random_bytes_after_the_handshake_end_their_own_link_only(void **state)
{
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	uint64_t random = 1;
	struct server server;
	afd_transport *net;

	if (!is_tcp())
		rig_skip("it is about the stream of tcp:");
	server_start(&server, NULL);
	net = join(&server, NULL);
	for (int round = 0; round < 40; round++) {
		struct afd__wire wire;
		uint8_t bytes[600];
		int fd = join_stranger(&wire, epoll_fd, server.address);

		for (size_t i = 0; i < sizeof(bytes); i++) {
			random = random * UINT64_C(6364136223846793005) + 1442695040888963407u;
			bytes[i] = (uint8_t)(random >> 56) & (i < 8 && round % 2 ? 3 : 255);
		}
		(void)!send(fd, bytes, sizeof(bytes), MSG_NOSIGNAL);
		run_step(net, 3, round);
		wire.ops->close(&wire);
	}
	wait_for(&server.n_joined, 1);
	afd_transport_destroy(net);
	server_stop(&server);
	close(epoll_fd);
}

static void a_handshake_that_comes_byte_by_byte_is_read(void **state)
{
	static struct afd__hello hello;
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	uint8_t message[AFD__HELLO_MAX];
	struct afd__wire wire;
	struct server server;
	size_t bytes;

	if (!is_tcp())
		rig_skip("it is about the stream of tcp:");
	server_start(&server, NULL);
	rig_connect(&wire, epoll_fd, server.address);
	make_hello(&hello, AFD__HELLO);
	bytes = afd__hello_encode(message, sizeof(message), &hello);
	for (size_t i = 0; i < bytes; i++) {
		assert_int_equal(send(tcp_of(&wire)->fd, message + i, 1, MSG_NOSIGNAL), 1);
		if (i % 16 == 0)
			sleep_ms(1);
	}
	assert_int_equal(rig_hear(&wire, &hello), 0);
	assert_int_equal(hello.kind, AFD__WELCOME);
	wire.ops->close(&wire);
	server_stop(&server);
	close(epoll_fd);
}

static void a_message_longer_than_its_limit_is_refused_by_its_prefix(void **state)
{
	static const uint8_t prefix[12] = { 'A', 'F', 'D', 'H', 1, 0, 1, 0, 0x01, 0x10, 0, 0 };
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	struct afd__wire wire;
	struct server server;

	if (!is_tcp())
		rig_skip("it is about the stream of tcp:");
	server_start(&server, NULL);
	rig_connect(&wire, epoll_fd, server.address);
	assert_int_equal(send(tcp_of(&wire)->fd, prefix, 12, MSG_NOSIGNAL), 12);
	rig_wait_logged("handshake: a message says 4097 bytes, must have 12 .. 4096");
	wire.ops->close(&wire);
	server_stop(&server);
	close(epoll_fd);
}

/* It asks without end and reads no answer: the socket fills, and only it waits. */
static void a_peer_that_does_not_read_holds_up_nobody(void **state)
{
	struct afd_transport_params params = { .lanes = 4, .max_rows = 2000 };
	static float x[8000 * HIDDEN], y[8000 * HIDDEN];
	struct server server;
	afd_transport *stalled, *net;

	if (!is_tcp())
		rig_skip("it is about the stream of tcp:");
	server_start(&server, &params);
	stalled = join(&server, &params);
	assert_int_equal(begin_step(stalled, 8000), 0);
	for (int32_t lane = 0; lane < 4; lane++) {
		struct afd_frame frame = frame_of(0, lane, 8000, x, y);

		assert_int_equal(afd_transport_dispatch(stalled, &frame), 0);
	}
	net = join(&server, NULL);
	for (int i = 0; i < 50; i++)
		run_step(net, 3, i);
	afd_transport_destroy(net);
	afd_transport_destroy(stalled);
	server_stop(&server);
}

/* ---- tcp: a crowd ---- */

/* From 127.0.0.HOST, to which loopback answers, too. */
static int connect_from(int host, const char *address)
{
	struct sockaddr_in from = { .sin_family = AF_INET,
		.sin_addr.s_addr = htonl(0x7f000000u + (unsigned)host) };
	struct sockaddr_in to = { .sin_family = AF_INET,
		.sin_port = htons((uint16_t)atoi(strrchr(address, ':') + 1)),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	assert_int_equal(bind(fd, (struct sockaddr *)&from, sizeof(from)), 0);
	assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof(to)), 0);
	return fd;
}

static bool has_ended(int fd)
{
	char byte;

	return recv(fd, &byte, 1, MSG_DONTWAIT) == 0;
}

static void a_source_that_takes_all_places_loses_its_own_only(void **state)
{
	enum { STRANGERS = 200, SLOW = 3 };
	int strangers[STRANGERS], slow[SLOW], n_ended = 0;
	struct server server;

	if (!is_tcp())
		rig_skip("it is about the stream of tcp:");
	server_start(&server, NULL);
	for (int i = 0; i < SLOW; i++)
		slow[i] = connect_from(3 + i, server.address);
	for (int i = 0; i < STRANGERS; i++)
		strangers[i] = connect_from(2, server.address);
	for (int i = 0; i < 400 && n_ended < STRANGERS + SLOW - AFD__PENDING_MAX; i++) {
		n_ended = 0;
		for (int k = 0; k < STRANGERS; k++)
			n_ended += has_ended(strangers[k]);
		sleep_ms(5);
	}
	assert_int_equal(n_ended, STRANGERS + SLOW - AFD__PENDING_MAX);
	for (int i = 0; i < SLOW; i++)
		assert_false(has_ended(slow[i]));
	rig_wait_logged("the oldest that is silent of the source that has most");
	for (int i = 0; i < STRANGERS; i++)
		close(strangers[i]);
	for (int i = 0; i < SLOW; i++)
		close(slow[i]);
	server_stop(&server);
}

/* Each poll has time for those who are joined. */
static void of_many_that_come_at_once_a_few_are_accepted_at_a_time(void **state)
{
	enum { STRANGERS = 60, AT_A_TIME = 16, WINDOW_MS = 10 };
	int strangers[STRANGERS], n_polls = 0;
	afd_transport *net;
	char address[96];
	uint64_t start;

	if (!is_tcp())
		rig_skip("it is about the stream of tcp:");
	rig_address(address);
	net = make_server(address, NULL);
	for (int i = 0; i < STRANGERS; i++)
		strangers[i] = connect_from(1, address);
	start = now_ms();
	while (net->n_accepted < STRANGERS) {
		uint64_t before = net->n_accepted;

		assert_true(afd_transport_poll(net) >= 0);
		/* A poll that is kept from running may reach into the next windows. */
		assert_in_range(net->n_accepted, 0,
			AT_A_TIME * ((now_ms() - start) / WINDOW_MS + 1));
		assert_in_range(afd_transport_timeout_ms(net), 0, 5000);
		n_polls += net->n_accepted != before;
		assert_true(afd__transport_sleep(net, -1, 1000) >= 0);
	}
	assert_in_range(n_polls, 4, STRANGERS);
	assert_in_range(now_ms() - start, 25, 3000);
	for (int i = 0; i < STRANGERS; i++)
		close(strangers[i]);
	afd_transport_destroy(net);
}

static void port_0_takes_a_free_one_and_says_it(void **state)
{
	const char *addresses[2] = { "tcp:127.0.0.1:0", "tcp:localhost:0" };
	struct afd_transport_params params = {
		.size = sizeof(params), .listen = addresses, .n_listen = 2
	};
	char first[128], second[128];
	afd_transport *net;

	if (!is_tcp())
		rig_skip("it is about the stream of tcp:");
	assert_int_equal(afd_transport_create(&net, server_ctx, &rig_contract, &params), 0);
	assert_int_equal(afd_transport_address(net, 0, first, sizeof(first)), 0);
	assert_int_equal(afd_transport_address(net, 1, second, sizeof(second)), 0);
	assert_memory_equal(first, "tcp:127.0.0.1:", 14);
	assert_memory_equal(second, "tcp:localhost:", 14);
	assert_true(atoi(first + 14) > 0 && atoi(second + 14) > 0);
	addresses[0] = second;
	params.n_listen = 0;
	params.connect = addresses;
	params.n_connect = 1;
	{
		afd_transport *peer;

		assert_int_equal(
			afd_transport_create(&peer, client_ctx, &rig_contract, &params), 0);
		while (afd_transport_poll(peer) == 0)
			assert_int_equal(afd_transport_poll(net), 1);
		assert_int_equal(afd_transport_poll(peer), 1);
		afd_transport_destroy(peer);
	}
	afd_transport_destroy(net);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(a_client_that_leaves_in_any_phase_of_the_handshake_leaves_nothing_behind),
		RIG_TEST(another_wire_version_is_refused_by_both_values),
		RIG_TEST(a_peer_that_scribbles_in_the_memory_loses_its_own_link_only),
		RIG_TEST(memory_that_could_shrink_or_is_too_small_is_refused),
		RIG_TEST(a_server_that_hangs_up_is_tried_again_until_a_real_one_comes),
		RIG_TEST(records_that_cannot_be_end_their_own_link_only),
		RIG_TEST(random_bytes_after_the_handshake_end_their_own_link_only),
		RIG_TEST(a_handshake_that_comes_byte_by_byte_is_read),
		RIG_TEST(a_message_longer_than_its_limit_is_refused_by_its_prefix),
		RIG_TEST(a_peer_that_does_not_read_holds_up_nobody),
		RIG_TEST(a_source_that_takes_all_places_loses_its_own_only),
		RIG_TEST(of_many_that_come_at_once_a_few_are_accepted_at_a_time),
		RIG_TEST(port_0_takes_a_free_one_and_says_it),
	};
	return RIG_RUN(argc, argv, tests);
}
