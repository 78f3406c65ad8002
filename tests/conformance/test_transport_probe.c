/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Probes: what is proved and what is said of the rest, beside a server that goes on serving; strangers
 * that misuse them; and auto:, which goes by the best that a probe proves.
 */
#include "transport_rig.h"

#include <stdio.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "../../lib/transport/hello.h"
#include "../../lib/transport/net.h"

static struct afd_probe_backend table[AFD_MAX_BACKENDS];

static struct afd_probe fresh_probe(void)
{
	memset(table, 0x5a, sizeof(table));
	return (struct afd_probe){ .size = sizeof(struct afd_probe),
		.backends = table,
		.backend_bytes = sizeof(table[0]),
		.max_backends = AFD_MAX_BACKENDS,
		.chosen = -7 };
}

static int probe_at(const char *address, uint32_t timeout_ms, struct afd_probe *out)
{
	struct afd_transport_params secret = { 0 };
	struct afd_probe_params params = { .size = sizeof(params), .timeout_ms = timeout_ms };

	rig_secret(&secret);
	params.key = secret.key;
	params.key_bytes = secret.key_bytes;
	params.tls = secret.tls;
	*out = fresh_probe();
	return afd_transport_probe(client_ctx, address, &params, out);
}

static bool is_auto(void)
{
	return !strcmp(rig_scheme(), "auto");
}

static bool has_key(void)
{
	struct afd_transport_params secret = { 0 };

	rig_secret(&secret);
	return secret.key;
}

/* What auto: takes between two processes of one host. */
static const char *expected(void)
{
	return is_auto() ? "shm" : rig_scheme();
}

static const struct afd_probe_backend *row_of(const char *scheme)
{
	for (int i = 0; i < AFD_MAX_BACKENDS; i++) {
		if (!strcmp(table[i].scheme, scheme))
			return &table[i];
	}
	fail_msg("no row for %s", scheme);
	return NULL;
}

static void expect_proved(const struct afd_probe_backend *b)
{
	if (b->machine || b->error)
		fail_msg("%s: %d %d %s", b->scheme, b->machine, b->error, b->text);
	assert_string_equal(b->text, "");
	assert_non_null(strchr(b->address, ':'));
	assert_true(b->round_trip_us > 0 && b->bytes_per_second > 0);
}

/* ---- what is found ---- */

static void what_is_proved_has_a_round_trip_and_a_bandwidth_and_the_rest_a_reason(void **state)
{
	struct server server;
	struct afd_probe out;

	server_start(&server, NULL);
	if (probe_at(server.address, 0, &out))
		fail_msg("%s", afd_last_error());
	assert_string_equal(table[out.chosen].scheme, expected());
	expect_proved(&table[out.chosen]);
	assert_true(out.n_backends >= 6);
	for (uint32_t i = 0; i < out.n_backends; i++) {
		bool proved = !table[i].error, is_chosen = (int)i == out.chosen;
		bool is_tcp = !strcmp(table[i].scheme, "tcp");

		assert_true(proved ? is_chosen || is_auto() : !is_chosen && !(is_auto() && is_tcp));
		assert_int_equal(proved, !table[i].text[0]);
		assert_int_equal(proved, table[i].round_trip_us > 0);
	}
	assert_int_equal(row_of("nccl")->machine, -ENOSYS);
	assert_int_equal(row_of("shm")->machine, 0);
	server_stop(&server);
}

static void probes_leave_no_descriptor_and_no_peer(void **state)
{
	struct afd_peer_info info = { .size = sizeof(info) };
	struct server server;
	struct afd_probe out;
	int before;

	server_start(&server, NULL);
	assert_int_equal(probe_at(server.address, 0, &out), 0);
	before = settled_descriptors();
	for (int i = 0; i < 20; i++)
		assert_int_equal(probe_at(server.address, 0, &out), 0);
	expect_descriptors(before);
	assert_int_equal(server.n_joined, 0);
	park(&server);
	assert_int_equal(afd_transport_peer(server.net, 0, &info), -ENOENT);
	server.silent = 0;
	assert_false(rig_logged("did not join"));
	server_stop(&server);
}

static void nobody_there_is_an_error_that_names_the_address_and_the_table_is_filled_in(void **state)
{
	char address[96];
	struct afd_probe out;
	uint64_t start = now_ms();

	rig_address(address);
	expect_error(probe_at(address, 0, &out), -ECONNREFUSED, "nobody listens there");
	assert_non_null(strstr(afd_last_error(), address));
	assert_in_range(now_ms() - start, 0, 2000);
	assert_int_equal(out.chosen, -1);
	assert_true(out.n_backends >= 6);
	assert_int_equal(row_of(expected())->machine, 0);
	assert_int_equal(row_of(expected())->error, -ECONNREFUSED);
	assert_int_equal(row_of("ipc")->error, -ENOSYS);
}

static void a_listener_that_does_not_answer_is_given_up_in_time(void **state)
{
	struct server server;
	struct afd_probe out;
	uint64_t start;

	server_start(&server, NULL);
	park(&server);
	start = now_ms();
	expect_error(probe_at(server.address, 300, &out), -ETIMEDOUT, "no answer in 300 ms");
	assert_in_range(now_ms() - start, 290, 2000);
	assert_int_equal(out.chosen, -1);
	assert_int_equal(row_of(is_auto() ? "tcp" : expected())->error, -ETIMEDOUT);
	server.silent = 0;
	server_stop(&server);
}

static void a_bad_question_is_refused_and_changes_nothing(void **state)
{
	struct afd_probe out = fresh_probe(), few = fresh_probe();
	struct afd_probe_params tls = { .size = sizeof(tls), .tls = 1 };
	char address[96];

	rig_address(address);
	expect_error(afd_transport_probe(client_ctx, NULL, NULL, &out), -EINVAL, "address is NULL");
	expect_error(afd_transport_probe(client_ctx, address, NULL, NULL), -EINVAL, "out is NULL");
	expect_error(afd_transport_probe(NULL, address, NULL, &out), -EINVAL, "context");
	expect_error(afd_transport_probe(client_ctx, "what:x", NULL, &out), -EINVAL, "unknown scheme");
	expect_error(afd_transport_probe(client_ctx, "auto:x", NULL, &out), -EINVAL, "HOST:PORT");
	expect_error(afd_transport_probe(client_ctx, address, &tls, &out), -EINVAL, "there is no key");
	few.max_backends = 2;
	expect_error(afd_transport_probe(client_ctx, address, NULL, &few), -ENOSPC, "max_backends is 2");
	few = fresh_probe();
	few.backends = NULL;
	expect_error(afd_transport_probe(client_ctx, address, NULL, &few), -EINVAL, "backends is NULL");
	assert_int_equal(out.chosen, -7);
	assert_int_equal(out.n_backends, 0);
	assert_int_equal(((uint8_t *)table)[0], 0x5a);
}

static void another_key_is_refused_by_name(void **state)
{
	struct afd_probe_params params = { .size = sizeof(params),
		.key = "quite another key of theirs",
		.key_bytes = 27 };
	struct afd_probe out = fresh_probe();
	struct server server;

	if (!has_key())
		rig_skip("this backend's server has no key");
	server_start(&server, NULL);
	assert_true(afd_transport_probe(client_ctx, server.address, &params, &out) < 0);
	assert_int_equal(out.chosen, -1);
	assert_true(row_of(is_auto() ? "tcp" : expected())->error < 0);
	server_stop(&server);
}

/* ---- those who are served ---- */

struct prober {
	const char *address;
	_Atomic int stop, n_done;
};

static void *probe_on(void *user)
{
	struct prober *p = user;
	struct afd_probe out;

	while (!p->stop) {
		if (probe_at(p->address, 0, &out))
			abort();
		p->n_done++;
	}
	return NULL;
}

static void rows_cross_unchanged_beside_probes(void **state)
{
	struct server server;
	struct prober prober = { .address = server.address };
	pthread_t thread;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, NULL);
	assert_int_equal(pthread_create(&thread, NULL, probe_on, &prober), 0);
	for (int i = 0; i < 2000 && prober.n_done < 3; i++)
		run_step(net, 1 + (uint32_t)i % 3, i);
	prober.stop = 1;
	pthread_join(thread, NULL);
	assert_true(prober.n_done > 0);
	assert_int_equal(server.n_joined, 1);
	afd_transport_destroy(net);
	server_stop(&server);
}

/* ---- strangers ---- */

static void say(struct afd__wire *wire, uint32_t kind, uint32_t bytes)
{
	struct afd__hello hello = {
		.kind = kind, .wire_version = AFD__WIRE_VERSION, .probe_bytes = bytes
	};

	rig_say(wire, &hello);
}

/* The kind of what was heard, or a negative errno. */
static int hear(struct afd__wire *wire, struct afd__hello *hello)
{
	int rc = rig_hear(wire, hello);

	return rc ? rc : (int)hello->kind;
}

/* Connected, with slots of `bytes`, after READY. */
static void echo_stranger(struct afd__wire *wire, int epoll_fd, const char *address, uint32_t bytes)
{
	struct afd__wire_slots slots = { .n_slots = 2,
		.n_control = 1,
		.eager = 1,
		.control_bytes = AFD__CONTROL_BYTES,
		.slot_bytes = bytes };
	static struct afd__hello said;

	rig_connect(wire, epoll_fd, address);
	say(wire, AFD__PROBE, bytes);
	assert_int_equal(hear(wire, &said), AFD__OFFER);
	assert_int_equal(said.probe_bytes, bytes);
	assert_int_equal(said.probe_slots, AFD__PROBE_SLOTS);
	rig_bind(wire, &slots);
	say(wire, AFD__READY, 0);
}

/* Sends slot 0 and has it back; negative when the link is over. */
static int bounce(struct afd__wire *wire)
{
	struct afd__completion done;
	int rc;

	memset(wire->ops->send_slot(wire, 0), 0x33, 64);
	while ((rc = wire->ops->post_send(wire, 0, 64)) == -EAGAIN)
		if (wire->ops->poll(wire, &done, 1) < 0)
			return -ECONNRESET;
	for (int i = 0; !rc && i < 5000; i++) {
		rc = wire->ops->poll(wire, &done, 1);
		if (rc == 1 && done.kind == AFD__RECEIVED)
			return wire->ops->post_receive(wire, 0);
		rc = rc < 0 ? rc : 0;
		/* Over shm: the end is an event. */
		if (!rc && i > 1000) {
			struct epoll_event event;

			if (epoll_wait(wire->epoll_fd, &event, 1, 1) > 0 &&
				wire->ops->event(wire, (uintptr_t)event.data.ptr & 7, event.events) < 0)
				return -ECONNRESET;
		}
	}
	return rc ? rc : -ETIMEDOUT;
}

static bool has_strangers(void)
{
	return !is_auto() && !has_key() && strcmp(rig_scheme(), "verbs");
}

static void more_slots_than_were_offered_end_a_probe(void **state)
{
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC), n = 0;
	struct afd__wire wire;
	struct server server;
	afd_transport *net;

	if (!has_strangers())
		rig_skip("strangers are of a backend alone, without a key");
	server_start(&server, NULL);
	echo_stranger(&wire, epoll_fd, server.address, 64);
	while (n <= AFD__PROBE_SLOTS && bounce(&wire) == 0)
		n++;
	assert_int_equal(n, AFD__PROBE_SLOTS);
	rig_wait_logged("the probe sent more than 128 slots");
	wire.ops->close(&wire);
	net = join(&server, NULL);
	run_step(net, 2, 1);
	afd_transport_destroy(net);
	server_stop(&server);
	close(epoll_fd);
}

static void a_ninth_probe_waits_until_one_has_had_its_time(void **state)
{
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	struct afd__wire wires[AFD__PROBES_MAX], ninth;
	static struct afd__hello said;
	struct server server;
	struct afd_probe out;

	if (!has_strangers())
		rig_skip("strangers are of a backend alone, without a key");
	server_start(&server, NULL);
	for (int i = 0; i < AFD__PROBES_MAX; i++)
		echo_stranger(&wires[i], epoll_fd, server.address, 4096);
	rig_connect(&ninth, epoll_fd, server.address);
	say(&ninth, AFD__PROBE, 64);
	assert_int_equal(hear(&ninth, &said), AFD__REFUSAL);
	assert_string_equal(said.field, "probes");
	ninth.ops->close(&ninth);
	assert_int_equal(probe_at(server.address, 0, &out), 0);
	for (int i = 0; i < AFD__PROBES_MAX; i++)
		wires[i].ops->close(&wires[i]);
	server_stop(&server);
	close(epoll_fd);
}

static void a_probe_never_becomes_a_peer(void **state)
{
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	struct afd__wire wire;
	static struct afd__hello said;
	struct server server;

	if (!has_strangers())
		rig_skip("strangers are of a backend alone, without a key");
	server_start(&server, NULL);
	rig_connect(&wire, epoll_fd, server.address);
	say(&wire, AFD__PROBE, 0);
	assert_int_equal(hear(&wire, &said), AFD__OFFER);
	assert_int_equal(said.probe_bytes, 0);
	assert_int_equal(hear(&wire, &said), -ECONNRESET);
	wire.ops->close(&wire);
	rig_connect(&wire, epoll_fd, server.address);
	say(&wire, AFD__PROBE, 64);
	assert_int_equal(hear(&wire, &said), AFD__OFFER);
	say(&wire, AFD__PROBE, 64);
	rig_wait_logged("did not join: handshake: message kind is 7, must be 3");
	wire.ops->close(&wire);
	assert_int_equal(server.n_joined, 0);
	server_stop(&server);
	close(epoll_fd);
}

/* ---- auto: ---- */

static void expect_by(const struct server *server, const char *scheme)
{
	struct afd_peer_info info;

	park((struct server *)server);
	info = peer_of(server->net, 0);
	if (strncmp(info.address, scheme, strlen(scheme)))
		fail_msg("the peer came by %s, not by %s", info.address, scheme);
	((struct server *)server)->silent = 0;
}

static void auto_goes_by_shared_memory_on_one_host_and_says_so(void **state)
{
	struct server server;
	afd_transport *net;

	if (!is_auto())
		rig_skip("of auto: only");
	server_start(&server, NULL);
	net = join(&server, NULL);
	run_step(net, 3, 1);
	rig_wait_logged(": shm:auto-");
	expect_by(&server, "shm:auto-");
	afd_transport_destroy(net);
	server_stop(&server);
}

static void auto_goes_by_tcp_where_shared_memory_was_not_proved(void **state)
{
	struct server server;
	afd_transport *net;

	if (!is_auto())
		rig_skip("of auto: only");
	server_start(&server, NULL);
	park(&server);
	/* As on another host without RDMA: nobody is there. */
	server.net->verbs_port = 0;
	server.net->shm_name[10] = server.net->shm_name[10] == '0' ? '1' : '0';
	server.silent = 0;
	net = join(&server, NULL);
	run_step(net, 3, 1);
	rig_wait_logged("is not used: shm:");
	rig_wait_logged(": tcp:127.0.0.1:");
	expect_by(&server, "auto:127.0.0.1:");
	afd_transport_destroy(net);
	server_stop(&server);
}

static void auto_joins_a_listener_that_offers_nothing(void **state)
{
	char address[96], there[96];
	struct server server;
	afd_transport *net;

	if (!is_auto())
		rig_skip("of auto: only");
	rig_address(address);
	snprintf(there, sizeof(there), "tcp:%s", address + strlen("auto:"));
	server_start_at(&server, there, NULL);
	net = make_client(address, NULL);
	assert_int_equal(afd_transport_wait(net, 0), 1);
	run_step(net, 3, 1);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void auto_listens_at_a_free_port_and_states_it(void **state)
{
	char address[96], second[96];
	afd_transport *net;

	if (!is_auto())
		rig_skip("of auto: only");
	net = make_server("auto:127.0.0.1:0", NULL);
	assert_int_equal(afd_transport_address(net, 0, address, sizeof(address)), 0);
	assert_true(!strncmp(address, "auto:127.0.0.1:", 15) && atoi(address + 15) > 0);
	assert_int_equal(afd_transport_address(net, 1, second, sizeof(second)), -ENOENT);
	afd_transport_destroy(net);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(what_is_proved_has_a_round_trip_and_a_bandwidth_and_the_rest_a_reason),
		RIG_TEST(probes_leave_no_descriptor_and_no_peer),
		RIG_TEST(nobody_there_is_an_error_that_names_the_address_and_the_table_is_filled_in),
		RIG_TEST(a_listener_that_does_not_answer_is_given_up_in_time),
		RIG_TEST(a_bad_question_is_refused_and_changes_nothing),
		RIG_TEST(another_key_is_refused_by_name),
		RIG_TEST(rows_cross_unchanged_beside_probes),
		RIG_TEST(more_slots_than_were_offered_end_a_probe),
		RIG_TEST(a_ninth_probe_waits_until_one_has_had_its_time),
		RIG_TEST(a_probe_never_becomes_a_peer),
		RIG_TEST(auto_goes_by_shared_memory_on_one_host_and_says_so),
		RIG_TEST(auto_goes_by_tcp_where_shared_memory_was_not_proved),
		RIG_TEST(auto_joins_a_listener_that_offers_nothing),
		RIG_TEST(auto_listens_at_a_free_port_and_states_it),
	};

	return RIG_RUN(argc, argv, tests);
}
