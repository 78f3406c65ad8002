/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Keys: who has none, or another, or repeats or changes what somebody else said, does not join, is
 * told why and logged; who has it joins through a crowd. On tcp:, and where verbs: meets, a proxy
 * stands between the two.
 */
#include "transport_rig.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static const char good[] = "sixteen bytes at least", other[] = "another sixteen bytes";

static struct afd_transport_params with_key(const char *key, uint32_t tls)
{
	return (struct afd_transport_params){ .key = key,
		.key_bytes = key ? strlen(key) : 0,
		.tls = tls,
		.connect_timeout_ms = 1000 };
}

static bool is_tcp(void)
{
	return !strcmp(rig_scheme(), "tcp");
}

/* The handshake crosses a TCP connection, in clear. */
static bool meets_by_tcp(void)
{
	return is_tcp() || !strcmp(rig_scheme(), "verbs");
}

/* ---- params ---- */

struct bad_key {
	struct afd_transport_params params;
	int code;
	const char *text;
};

static void keys_out_of_range_are_refused_by_name(void **state)
{
	static char long_key[4097];
	const struct bad_key cases[] = {
		{ { .key = good, .key_bytes = 15 }, -EINVAL, "key: has 15 bytes, must have 16 .. 4096" },
		{ { .key = long_key, .key_bytes = 4097 }, -EINVAL, "key: has 4097 bytes" },
		{ { .key = good }, -EINVAL, "key is given, and key_bytes is 0" },
		{ { .key_bytes = 16 }, -EINVAL, "key is NULL, and key_bytes is 16" },
		{ { .key = good, .key_bytes = 16, .key_file = "x" }, -EINVAL, "both given" },
		{ { .tls = 1 }, -EINVAL, "tls is 1, and there is no key" },
		{ { .key = good, .key_bytes = 16, .tls = 2 }, -EINVAL, "tls is 2, limit 1" },
		{ { .key_file = "/nowhere/at/all" }, -ENOENT, "key /nowhere/at/all: " },
		{ { .key_file = "/dev/null" }, -EINVAL, "is no regular file" },
	};
	char address[96];

	rig_address(address);
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		assert_null(make_server(address, &cases[i].params));
		expect_error(cases[i].code, cases[i].code, cases[i].text);
	}
}

static void write_key(const char *path, const char *key, mode_t mode)
{
	FILE *file = fopen(path, "w");

	assert_non_null(file);
	fputs(key, file);
	fclose(file);
	assert_int_equal(chmod(path, mode), 0);
}

static void a_file_that_others_can_open_is_refused(void **state)
{
	static const mode_t modes[] = { 0640, 0604, 0644, 0620 };
	char path[64], address[96];
	struct afd_transport_params params = { .key_file = path };
	afd_transport *net;

	snprintf(path, sizeof(path), "/tmp/afd-test-key-%d", (int)getpid());
	rig_address(address);
	for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++) {
		write_key(path, good, modes[i]);
		assert_null(make_server(address, &params));
		expect_error(-EACCES, -EACCES, "others may open it, mode is 6");
	}
	write_key(path, "short", 0600);
	assert_null(make_server(address, &params));
	expect_error(-EINVAL, -EINVAL, "key: has 5 bytes");
	write_key(path, good, 0600);
	net = make_server(address, &params);
	assert_non_null(net);
	afd_transport_destroy(net);
	unlink(path);
}

/* ---- who joins ---- */

struct meeting {
	const char *server, *client; /* keys */
	uint32_t server_tls, client_tls;
	const char *told, *logged;
};

static void expect_no_meeting(const struct meeting *m)
{
	struct afd_transport_params server_params = with_key(m->server, m->server_tls),
				    client_params = with_key(m->client, m->client_tls);
	struct server server;
	afd_transport *net;
	uint64_t start = now_ms();
	int rc;

	server_start(&server, &server_params);
	net = make_client(server.address, &client_params);
	rc = afd_transport_wait(net, 3000);
	if (rc >= 0 || !strstr(afd_last_error(), m->told))
		fail_msg("%d \"%s\", should be \"%s\"", rc, afd_last_error(), m->told);
	assert_non_null(strstr(afd_last_error(), server.address));
	assert_in_range(now_ms() - start, 0, 2500);
	rig_wait_logged(m->logged);
	assert_int_equal(server.n_joined, 0);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void who_has_no_key_or_another_is_told_so_and_logged(void **state)
{
	static const struct meeting meetings[] = {
		{ good, other, 0, 0, "the FFN peer does not prove our key",
			"refused: key is another there, required here" },
		{ good, NULL, 0, 0, "refused by the FFN peer: key is required there, none here",
			"refused: key is none there, required here" },
		{ NULL, good, 0, 0, "the FFN peer proves no key; ours is required",
			"refused: key is required there, none here" },
	};

	for (size_t i = 0; i < sizeof(meetings) / sizeof(meetings[0]); i++)
		expect_no_meeting(&meetings[i]);
}

static void tls_on_one_side_or_with_another_key_is_no_link(void **state)
{
	static const struct meeting meetings[] = {
		{ good, other, 1, 1, "tls: ", "did not join: tls: " },
		{ good, good, 1, 0, "no FFN peer joined within 1000 ms", "did not join: tls: " },
		{ good, good, 0, 1, "no FFN peer joined within 1000 ms", "did not join: handshake: begins with 16 03" },
	};

	if (!is_tcp())
		rig_skip("it is about what tcp: sends");
	for (size_t i = 0; i < sizeof(meetings) / sizeof(meetings[0]); i++)
		expect_no_meeting(&meetings[i]);
}

static void who_has_the_key_joins_and_is_served(void **state)
{
	for (uint32_t tls = 0; tls < (rig_ops()->in_clear ? 1 : 2); tls++) {
		struct afd_transport_params params = with_key(good, tls);
		struct server server;
		afd_transport *net;

		server_start(&server, &params);
		net = join(&server, &params);
		for (int i = 0; i < 20; i++)
			run_step(net, 9, i);
		afd_transport_destroy(net);
		server_stop(&server);
	}
}

static void tls_where_rows_cannot_be_encrypted_is_refused(void **state)
{
	struct afd_transport_params params = with_key(good, 1);
	char address[96];

	if (!rig_ops()->in_clear)
		rig_skip("rows of this backend can be encrypted, or do not leave the host");
	rig_address(address);
	assert_null(make_server(address, &params));
	assert_non_null(strstr(afd_last_error(), "rows cannot be encrypted there"));
}

static void a_key_may_have_16_to_4096_bytes_of_any_value(void **state)
{
	static uint8_t key[4096];

	for (size_t i = 0; i < sizeof(key); i++)
		key[i] = (uint8_t)(i * 7);
	for (size_t bytes = 16; bytes <= sizeof(key); bytes += sizeof(key) - 16) {
		struct afd_transport_params params = {
			.key = key, .key_bytes = bytes, .tls = is_tcp()
		};
		struct server server;
		afd_transport *net;

		server_start(&server, &params);
		net = join(&server, &params);
		run_step(net, 3, 1);
		afd_transport_destroy(net);
		server_stop(&server);
	}
}

/* ---- a proxy ---- */

enum { SEEN_MAX = 1 << 20 };

static struct proxy {
	pthread_t thread;
	char address[96];
	int listener, server_port;
	_Atomic int stop, flip_side, flip_at; /* byte flip_at of what side 0 (client) or 1 says */
	const uint8_t *paste; /* NULL, or what that side says there instead: */
	size_t paste_bytes;
	size_t n_seen[2];
	uint8_t seen[2][SEEN_MAX];
} proxy;

static int port_of(const char *address)
{
	return atoi(strrchr(address, ':') + 1);
}

static struct sockaddr_in at_port(int port)
{
	return (struct sockaddr_in){ .sin_family = AF_INET,
		.sin_port = htons((uint16_t)port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
}

static uint8_t change(int side, size_t at, uint8_t byte)
{
	size_t from = (size_t)proxy.flip_at;

	if (side != proxy.flip_side)
		return byte;
	if (proxy.paste)
		return at - from < proxy.paste_bytes ? proxy.paste[at - from] : byte;
	return at == from ? byte ^ 0x10 : byte;
}

/* -1: one side has ended. */
static int pass(int from, int to, int side)
{
	uint8_t bytes[4096];
	ssize_t n = recv(from, bytes, sizeof(bytes), MSG_DONTWAIT);

	if (n < 0)
		return errno == EAGAIN ? 0 : -1;
	for (ssize_t i = 0; i < n; i++) {
		bytes[i] = change(side, proxy.n_seen[side], bytes[i]);
		if (proxy.n_seen[side] < SEEN_MAX)
			proxy.seen[side][proxy.n_seen[side]++] = bytes[i];
	}
	return n > 0 && send(to, bytes, (size_t)n, MSG_NOSIGNAL) == n ? 0 : -1;
}

static void pass_all(int client)
{
	struct sockaddr_in place = at_port(proxy.server_port);
	int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct pollfd both[2] = { { client, POLLIN, 0 }, { server, POLLIN, 0 } };

	proxy.n_seen[0] = proxy.n_seen[1] = 0; /* of the last connection */
	if (!connect(server, (struct sockaddr *)&place, sizeof(place))) {
		while (!proxy.stop) {
			poll(both, 2, 5);
			if (pass(client, server, 0) || pass(server, client, 1))
				break;
		}
	}
	close(server);
	close(client);
}

static void *run_proxy(void *user)
{
	while (!proxy.stop) {
		struct pollfd one = { proxy.listener, POLLIN, 0 };
		int client = poll(&one, 1, 5) > 0 ? accept(proxy.listener, NULL, NULL) : -1;

		if (client >= 0)
			pass_all(client);
	}
	return NULL;
}

static void start_proxy(const struct server *server, int flip_side, int flip_at)
{
	struct sockaddr_in place;
	int one = 1;

	rig_address(proxy.address);
	place = at_port(port_of(proxy.address));
	proxy.server_port = port_of(server->address);
	proxy.stop = 0;
	proxy.flip_side = flip_side;
	proxy.flip_at = flip_at;
	proxy.n_seen[0] = proxy.n_seen[1] = 0;
	proxy.listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	setsockopt(proxy.listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	assert_int_equal(bind(proxy.listener, (struct sockaddr *)&place, sizeof(place)), 0);
	assert_int_equal(listen(proxy.listener, 8), 0);
	assert_int_equal(pthread_create(&proxy.thread, NULL, run_proxy, NULL), 0);
}

static void stop_proxy(void)
{
	proxy.stop = 1;
	pthread_join(proxy.thread, NULL);
	close(proxy.listener);
	proxy.paste = NULL;
}

static void a_handshake_that_is_replayed_is_refused(void **state)
{
	struct afd_transport_params params = with_key(good, 0);
	struct server server;
	struct sockaddr_in place;
	afd_transport *net;
	char answer[512];
	int fd;

	if (!meets_by_tcp())
		rig_skip("it is about what crosses a TCP connection");
	server_start(&server, &params);
	start_proxy(&server, 0, -1);
	net = make_client(proxy.address, &params);
	assert_int_equal(afd_transport_wait(net, 3000), 1);
	run_step(net, 2, 1);
	afd_transport_destroy(net);
	stop_proxy();
	wait_for(&server.n_joined, 0);
	place = at_port(proxy.server_port);
	fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_int_equal(connect(fd, (struct sockaddr *)&place, sizeof(place)), 0);
	assert_int_equal(send(fd, proxy.seen[0], proxy.n_seen[0], MSG_NOSIGNAL), proxy.n_seen[0]);
	rig_wait_logged("refused: key is another there, required here");
	while (recv(fd, answer, sizeof(answer), 0) > 0)
		;
	assert_int_equal(server.n_joined, 0);
	close(fd);
	server_stop(&server);
}

/* Whichever byte of the handshake is changed, on either side. */
static void a_handshake_that_is_changed_on_its_way_is_no_link(void **state)
{
	struct afd_transport_params params = with_key(good, 0);
	size_t n_bytes[2];
	struct server server;
	afd_transport *net;

	if (!meets_by_tcp())
		rig_skip("it is about what crosses a TCP connection");
	server_start(&server, &params);
	start_proxy(&server, 0, -1);
	net = make_client(proxy.address, &params);
	assert_int_equal(afd_transport_wait(net, 3000), 1);
	wait_for(&server.n_joined, 1);
	n_bytes[0] = proxy.n_seen[0];
	n_bytes[1] = proxy.n_seen[1];
	afd_transport_destroy(net);
	stop_proxy();
	wait_for(&server.n_joined, 0);
	params.connect_timeout_ms = 60;
	for (int side = 0; side < 2; side++) {
		for (size_t at = 0; at < n_bytes[side]; at += at < 60 ? 7 : 23) {
			start_proxy(&server, side, (int)at);
			net = make_client(proxy.address, &params);
			/* The last message is the client's: it may think that it has joined. */
			if (afd_transport_wait(net, 500) == 1 &&
				!(side == 0 && at + 48 >= n_bytes[0]))
				fail_msg("joined, with byte %zu of side %d changed", at, side);
			sleep_ms(5);
			assert_int_equal(server.n_joined, 0);
			afd_transport_destroy(net);
			stop_proxy();
		}
	}
	server_stop(&server);
}

/* What a side said of its queue pairs, [*bytes] from the offset on. */
static size_t find_queue_pairs(int side, size_t *bytes)
{
	static const uint8_t prefix[] = { 'A', 'F', 'D', 'H', 1, 0, 6, 0 };
	const uint8_t *at = memmem(proxy.seen[side], proxy.n_seen[side], prefix, sizeof(prefix));

	if (!at)
		fail_msg("side %d described no queue pairs", side);
	*bytes = at[8] | (size_t)at[9] << 8;
	return (size_t)(at - proxy.seen[side]);
}

/* Joins once through a proxy that changes nothing, so that it has seen what both sides say. */
static void overhear(struct server *server, const struct afd_transport_params *params)
{
	afd_transport *net;

	start_proxy(server, 0, -1);
	net = make_client(proxy.address, params);
	assert_int_equal(afd_transport_wait(net, 3000), 1);
	run_step(net, 2, 1);
	afd_transport_destroy(net);
	stop_proxy();
	wait_for(&server->n_joined, 0);
}

/* Through a proxy that changes what a side says of its queue pairs. */
static void expect_no_binding(struct server *server, int side, int flip_at)
{
	struct afd_transport_params params = with_key(good, 0);
	afd_transport *net;

	start_proxy(server, side, flip_at);
	net = make_client(proxy.address, &params);
	assert_true(afd_transport_wait(net, 3000) < 0);
	if (side)
		expect_error(-EACCES, -EACCES, "queue pairs: the FFN peer does not prove our key");
	else
		rig_wait_logged("did not join: queue pairs: the attention peer does not prove our key");
	assert_int_equal(server->n_joined, 0);
	afd_transport_destroy(net);
	stop_proxy();
}

/* The number, the key for payload, the GID, the proof itself. */
static void queue_pairs_that_are_changed_on_their_way_are_refused(void **state)
{
	static const size_t places[] = { 36, 36 + 8, 36 + 39, 36 + 40 + 4 };
	struct afd_transport_params params = with_key(good, 0);
	struct server server;
	size_t bytes;

	if (strcmp(rig_scheme(), "verbs"))
		rig_skip("it is about what verbs: sends");
	for (int side = 0; side < 2; side++) {
		server_start(&server, &params);
		overhear(&server, &params);
		size_t at = find_queue_pairs(side, &bytes);
		assert_int_equal(bytes, 36 + 40 + AFD__SEAL_BYTES);
		for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++)
			expect_no_binding(&server, side, (int)(at + places[i]));
		server_stop(&server);
	}
}

static void queue_pairs_of_an_earlier_handshake_are_refused(void **state)
{
	struct afd_transport_params params = with_key(good, 0);
	uint8_t earlier[256];
	struct server server;

	if (strcmp(rig_scheme(), "verbs"))
		rig_skip("it is about what verbs: sends");
	for (int side = 0; side < 2; side++) {
		server_start(&server, &params);
		overhear(&server, &params);
		size_t at = find_queue_pairs(side, &proxy.paste_bytes);
		assert_in_range(proxy.paste_bytes, 1, sizeof(earlier));
		memcpy(earlier, proxy.seen[side] + at, proxy.paste_bytes);
		proxy.paste = earlier;
		expect_no_binding(&server, side, (int)at);
		server_stop(&server);
	}
}

static bool holds(const uint8_t *bytes, size_t n_bytes, const void *part, size_t part_bytes)
{
	return memmem(bytes, n_bytes, part, part_bytes);
}

static void with_tls_no_row_crosses_in_clear(void **state)
{
	if (!is_tcp())
		rig_skip("it is about what tcp: sends");
	for (uint32_t tls = 0; tls < 2; tls++) {
		struct afd_transport_params params = with_key(good, tls);
		float x[3 * HIDDEN], y[3 * HIDDEN];
		struct afd_frame frame = frame_of(1, 0, 3, x, y);
		struct server server;
		afd_transport *net;

		server_start(&server, &params);
		start_proxy(&server, 0, -1);
		net = make_client(proxy.address, &params);
		assert_int_equal(afd_transport_wait(net, 3000), 1);
		fill_rows(x, 3, 1);
		assert_int_equal(begin_step(net, 3), 0);
		assert_int_equal(afd_transport_exchange(net, &frame), 0);
		afd_transport_destroy(net);
		stop_proxy();
		assert_true(proxy.n_seen[0] > sizeof(x) && proxy.n_seen[1] > sizeof(y));
		assert_int_equal(holds(proxy.seen[0], proxy.n_seen[0], x, 16), !tls);
		assert_int_equal(holds(proxy.seen[1], proxy.n_seen[1], y, 16), !tls);
		assert_int_equal(holds(proxy.seen[0], proxy.n_seen[0], "AFDF", 4), !tls);
		server_stop(&server);
	}
}

/* ---- a crowd ---- */

static void a_thousand_that_say_nothing_keep_nobody_with_the_key_out(void **state)
{
	enum { STRANGERS = 1000 };
	static struct afd__wire wires[STRANGERS];
	struct afd_transport_params params = with_key(good, 0);
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC), n = 0;
	struct server server;
	afd_transport *served, *net;

	params.connect_timeout_ms = 10000;
	server_start(&server, &params);
	served = join(&server, &params);
	for (; n < STRANGERS; n++) {
		if (n >= 300)
			wires[n - 300].ops->close(&wires[n - 300]);
		rig_connect(&wires[n], epoll_fd, server.address);
		if (n % 100 == 0)
			run_step(served, 3, n);
	}
	net = join(&server, &params);
	run_step(net, 3, 1);
	run_step(served, 3, 1);
	rig_wait_logged("it is the oldest that is silent");
	for (n = STRANGERS - 300; n < STRANGERS; n++)
		wires[n].ops->close(&wires[n]);
	afd_transport_destroy(net);
	afd_transport_destroy(served);
	server_stop(&server);
	close(epoll_fd);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(keys_out_of_range_are_refused_by_name),
		RIG_TEST(a_file_that_others_can_open_is_refused),
		RIG_TEST(who_has_no_key_or_another_is_told_so_and_logged),
		RIG_TEST(tls_on_one_side_or_with_another_key_is_no_link),
		RIG_TEST(who_has_the_key_joins_and_is_served),
		RIG_TEST(tls_where_rows_cannot_be_encrypted_is_refused),
		RIG_TEST(a_key_may_have_16_to_4096_bytes_of_any_value),
		RIG_TEST(a_handshake_that_is_replayed_is_refused),
		RIG_TEST(a_handshake_that_is_changed_on_its_way_is_no_link),
		RIG_TEST(queue_pairs_that_are_changed_on_their_way_are_refused),
		RIG_TEST(queue_pairs_of_an_earlier_handshake_are_refused),
		RIG_TEST(with_tls_no_row_crosses_in_clear),
		RIG_TEST(a_thousand_that_say_nothing_keep_nobody_with_the_key_out),
	};
	return RIG_RUN(argc, argv, tests);
}
