/* SPDX-License-Identifier: Apache-2.0 */
/* Meeting: addresses, what is refused and how both sides name it, servers that come late, places
 * for peers, strangers. */
#include "transport_rig.h"

#include <sys/epoll.h>
#include <unistd.h>

#include "../../lib/transport/ops.h"

/* ---- addresses and params ---- */

struct bad_address {
	const char *address;
	int code;
	const char *text;
};

static void bad_addresses_are_refused_by_name(void **state)
{
	static const struct bad_address cases[] = {
		{ "", -EINVAL, "must be SCHEME:NAME" },
		{ "ffn0", -EINVAL, "must be SCHEME:NAME" },
		{ ":ffn0", -EINVAL, "must be SCHEME:NAME" },
		{ "shm:", -EINVAL, "the name has 0 characters" },
		{ "loop:a/b", -EINVAL, "character 2 of the name" },
		{ "loop:"
		  "01234567890123456789012345678901234567890123456789012345678901234567890123456789"
		  "01",
			-EINVAL, "the name has 82 characters, must have 1 .. 80" },
		{ "carrier:pigeon", -EINVAL, "unknown scheme" },
		{ "tcp:localhost", -EINVAL, "must be tcp:HOST:PORT" },
		{ "tcp::7000", -EINVAL, "must be tcp:HOST:PORT" },
		{ "tcp:localhost:", -EINVAL, "port \"\", limit 0 to 65535" },
		{ "tcp:localhost:65536", -EINVAL, "port \"65536\", limit 0 to 65535" },
		{ "tcp:localhost:70a", -EINVAL, "port \"70a\"" },
		{ "tcp:::1:7000", -EINVAL, "must be tcp:HOST:PORT" },
		{ "tcp:fe80::1:7000", -EINVAL, "an IPv6 address stands in brackets" },
		{ "tcp:[::1]7000", -EINVAL, "must be tcp:HOST:PORT" },
		{ "tcp:a b:7000", -EINVAL, "character 2 of the name" },
		{ "tcp:0123456789012345678901234567890123456789012345678901234567890123456789:1",
			-EINVAL, "the host has 70 characters, limit 64" },
		{ "verbs:host", -EINVAL, "must be tcp:HOST:PORT" },
		{ "verbs:host:1?dev=", -EINVAL, "dev names no device" },
		{ "verbs:host:1?dev=a,b,c,d,e", -EINVAL, "dev names more than 4" },
		{ "verbs:host:1?dev=0123456789012345678901234567890123", -EINVAL,
			"has 34 characters, limit 31" },
		{ "verbs:host:1?mtu=1000", -EINVAL, "mtu is 1000, must be 256, 512" },
		{ "verbs:host:1?gid=256", -EINVAL, "gid is \"256\", limit 0 to 255" },
		{ "verbs:host:1?port=x", -EINVAL, "port is \"x\", limit 0 to 255" },
		{ "verbs:host:1?sl=16", -EINVAL, "sl is \"16\", limit 0 to 15" },
		{ "verbs:host:1?timeout=22", -EINVAL, "timeout is \"22\", limit 0 to 21" },
		{ "verbs:host:1?colour=red", -EINVAL, "no parameter \"colour\"" },
		{ "verbs:host:1?dev", -EINVAL, "\"dev\" must be NAME=VALUE" },
		{ "verbs:host:1?", -EINVAL, "\"\" must be NAME=VALUE" },
		{ "verbs:host:1?gid=1&", -EINVAL, "\"\" must be NAME=VALUE" },
		{ "nccl:0", -ENOSYS, "nccl: is not part of this build" },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct afd_transport_params params = { .size = sizeof(params), .n_connect = 1 };
		afd_transport *net = NULL;

		params.connect = &cases[i].address;
		expect_error(afd_transport_create(&net, client_ctx, &rig_contract, &params),
			cases[i].code, cases[i].text);
		params = (struct afd_transport_params){
			.size = sizeof(params), .n_listen = 1, .listen = &cases[i].address
		};
		expect_error(afd_transport_create(&net, client_ctx, &rig_contract, &params),
			cases[i].code, cases[i].text);
		assert_null(net);
	}
}

struct bad_params {
	struct afd_transport_params params;
	int code;
	const char *text;
};

static void params_out_of_range_are_refused_by_name(void **state)
{
	static const char *const two[] = { "loop:a", "loop:b" };
	const struct bad_params cases[] = {
		{ { .n_connect = 0 }, -EINVAL, "exactly one must be set" },
		{ { .n_connect = 1, .n_listen = 1 }, -EINVAL, "exactly one must be set" },
		{ { .n_connect = 65 }, -EINVAL, "65 addresses, limit 64" },
		{ { .n_connect = 1, .shard = { .n_ep = 2 } }, -EINVAL, "shard is the FFN side's" },
		{ { .n_listen = 1, .shard = { .tp = 2, .n_tp = 2 } }, -EINVAL, "tp 2 of 2" },
		{ { .n_listen = 1, .shard = { .n_tp = 13, .n_ep = 5 } }, -EINVAL,
			"13 x 5 shards, limit 64" },
		{ { .n_connect = 1, .group = "loop:g" }, -EINVAL, "group_size is 0" },
		{ { .n_connect = 1, .group_size = 2 }, -EINVAL, "group is NULL" },
		{ { .n_connect = 1, .group = "loop:g", .group_size = 65 }, -EINVAL,
			"group_size is 65, limit 64" },
		{ { .n_connect = 1, .group = "loop:g", .group_size = 2, .group_index = 2 }, -EINVAL,
			"group_index is 2, group_size is 2" },
		{ { .n_listen = 1, .group = "loop:g", .group_size = 2 }, -EINVAL,
			"group is the attention side's" },
		{ { .n_connect = 1, .lanes = 5 }, -EINVAL, "lanes is 5, limit 4" },
		{ { .n_connect = 1, .max_rows = 65537 }, -EINVAL,
			"max_rows is 65537, limit 65536" },
		{ { .n_connect = 1, .to_ffn_dtype = -1 }, -EINVAL, "to_ffn_dtype is -1, limit 4" },
		{ { .n_connect = 1, .to_attention_dtype = 5 }, -EINVAL, "to_attention_dtype is 5" },
		{ { .n_connect = 1, .gate = 3 }, -EINVAL, "gate is 3, limit 2" },
		{ { .n_listen = 1, .max_peers = 1025 }, -EINVAL, "max_peers is 1025, limit 1024" },
		{ { .n_listen = 1, .first_layer = 2, .n_layers = 2 }, -EINVAL,
			"layers held are 2 from 2 on" },
		{ { .n_connect = 1, ._pad = 1 }, -EINVAL, "_pad is 1" },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct afd_transport_params params = cases[i].params;
		afd_transport *net = NULL;

		params.size = sizeof(params);
		params.listen = params.n_listen ? two : NULL;
		params.connect = params.n_connect ? two : NULL;
		expect_error(afd_transport_create(&net, client_ctx, &rig_contract, &params),
			cases[i].code, cases[i].text);
		assert_null(net);
	}
}

struct bad_contract {
	struct afd_contract contract;
	int code;
	const char *text;
};

static void contracts_without_sense_are_refused_by_field(void **state)
{
	static const uint8_t moe[2] = { AFD_FFN_DENSE, AFD_FFN_MOE }, odd[2] = { 1, 9 };
	const struct bad_contract cases[] = {
		{ { .n_layers = 2 }, -EINVAL, "hidden_size is 0" },
		{ { .hidden_size = 65537, .n_layers = 2 }, -EINVAL, "hidden_size is 65537" },
		{ { .hidden_size = 8 }, -EINVAL, "n_layers is 0" },
		{ { .hidden_size = 8, .n_layers = 1025 }, -EINVAL, "n_layers is 1025" },
		{ { .hidden_size = 8, .n_layers = 2, .ffn_kinds = moe }, -EINVAL,
			"layer 1 has experts, and n_experts is 0" },
		{ { .hidden_size = 8, .n_layers = 2, .router = AFD_ROUTER_SOFTMAX, .n_experts = 4,
			  .top_k = 5 },
			-EINVAL, "top_k is 5, limit 4" },
		{ { .hidden_size = 8, .n_layers = 2, .router = AFD_ROUTER_SOFTMAX, .n_experts = 65537,
			  .top_k = 5 },
			-EINVAL, "n_experts is 65537" },
		{ { .hidden_size = 8, .n_layers = 2, .shared_experts = 2 }, -EINVAL,
			"shared_experts is 2" },
		{ { .hidden_size = 8, .n_layers = 2, .ffn_kinds = odd }, -EINVAL,
			"ffn_kinds[1] is 9" },
		{ { .hidden_size = 8, .n_layers = 2, .top_k = 2 }, -EINVAL, "top_k is 2" },
		{ { .hidden_size = 8, .n_layers = 2, .activation = 2 }, -EINVAL,
			"activation is 2" },
	};
	const char *address = "loop:a";
	struct afd_transport_params params = {
		.size = sizeof(params), .n_connect = 1, .connect = &address
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct afd_contract contract = cases[i].contract;
		afd_transport *net = NULL;

		contract.size = sizeof(contract);
		expect_error(afd_transport_create(&net, client_ctx, &contract, &params),
			cases[i].code, cases[i].text);
		assert_null(net);
	}
}

static void an_address_in_use_is_refused_and_free_after_its_end(void **state)
{
	struct server server;
	afd_transport *again;

	server_start(&server, NULL);
	again = make_server(server.address, NULL);
	assert_null(again);
	expect_error(-EADDRINUSE, -EADDRINUSE, "somebody listens there");
	server_stop(&server);
	again = make_server(server.address, NULL);
	assert_non_null(again);
	afd_transport_destroy(again);
}

/* ---- disagreement ---- */

/* The client's error and the server's log, each from its own point of view. */
static void expect_refused(struct server *server, const struct afd_transport_params *params,
	const char *client, const char *log)
{
	afd_transport *net = make_client(server->address, params);

	expect_error(afd_transport_wait(net, 0), -EPROTO, client);
	assert_non_null(strstr(afd_last_error(), server->address));
	rig_wait_logged(log);
	assert_true(rig_logged(server->address));
	afd_transport_destroy(net);
}

static void another_contract_is_refused_by_field_on_both_sides(void **state)
{
	struct server server;

	server_start(&server, NULL);
	rig_contract.hidden_size = 48;
	expect_refused(&server, NULL, "refused by the FFN peer: hidden_size is 24 there, 48 here",
		"hidden_size is 48 there, 24 here");
	rig_contract.hidden_size = HIDDEN;
	rig_contract.n_layers = 5;
	expect_refused(&server, NULL, "n_layers is 3 there, 5 here", "n_layers is 5 there, 3 here");
	server_stop(&server);
}

static void a_dtype_that_the_server_does_not_take_is_refused_on_both_sides(void **state)
{
	struct afd_transport_params only = { .to_ffn_dtype = AFD_DTYPE_BF16 },
				    f32 = { .to_ffn_dtype = AFD_DTYPE_F32 },
				    fp8 = { .to_ffn_dtype = AFD_DTYPE_FP8 };
	struct server server;
	afd_transport *net;

	server_start(&server, &only);
	expect_refused(&server, &f32, "to_ffn_dtype is bf16 there, f32 here",
		"to_ffn_dtype is f32 there, bf16 here");
	expect_refused(&server, &fp8, "to_ffn_dtype is bf16 there, fp8 here",
		"to_ffn_dtype is fp8 there, bf16 here");
	net = join(&server, &only);
	run_step(net, 2, 1);
	afd_transport_destroy(net);
	server_stop(&server);
	only = (struct afd_transport_params){ .to_attention_dtype = AFD_DTYPE_FP8 };
	server_start(&server, &only);
	expect_refused(&server, &f32, "to_attention_dtype is fp8 there, f32 here",
		"to_attention_dtype is f32 there, fp8 here");
	server_stop(&server);
}

static void layers_that_the_server_does_not_hold_are_refused_on_both_sides(void **state)
{
	struct afd_transport_params some = { .first_layer = 1, .n_layers = 2 };
	struct server server;

	server_start(&server, &some);
	expect_refused(&server, NULL, "layers is 2 from 1 on held there, 3 from 0 on wanted here",
		"layers is 3 from 0 on wanted there, 2 from 1 on held here");
	server_stop(&server);
}

static void one_peer_too_many_is_refused_and_joins_when_there_is_room(void **state)
{
	struct afd_transport_params two = { .max_peers = 2 };
	afd_transport *nets[2], *third;
	struct server server;

	server_start(&server, &two);
	nets[0] = join(&server, NULL);
	nets[1] = join(&server, NULL);
	expect_refused(
		&server, NULL, "max_peers is 2 there", "max_peers is one more there, 2 here");
	wait_for(&server.n_joined, 2);
	afd_transport_destroy(nets[0]);
	wait_for(&server.n_joined, 1);
	third = join(&server, NULL);
	run_step(third, 2, 1);
	run_step(nets[1], 2, 1);
	afd_transport_destroy(third);
	afd_transport_destroy(nets[1]);
	server_stop(&server);
}

static void a_refused_client_disturbs_nobody(void **state)
{
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, NULL);
	for (int i = 0; i < 5; i++) {
		rig_contract.hidden_size = 48;
		expect_refused(&server, NULL, "hidden_size", "hidden_size");
		rig_contract.hidden_size = HIDDEN;
		run_step(net, 2, i);
	}
	afd_transport_destroy(net);
	server_stop(&server);
}

/* ---- time ---- */

static void a_server_that_comes_late_is_waited_for(void **state)
{
	struct server server;
	char address[96];
	afd_transport *net;

	rig_address(address);
	net = make_client(address, NULL);
	assert_int_equal(afd_transport_poll(net), 0);
	expect_error(afd_transport_wait(net, 60), -ETIMEDOUT, "waited 60 ms, missing: ");
	server_start_at(&server, address, NULL);
	assert_int_equal(afd_transport_wait(net, 0), 1);
	run_step(net, 2, 1);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void a_server_that_never_comes_is_named_after_the_timeout(void **state)
{
	struct afd_transport_params params = { .connect_timeout_ms = 120 };
	uint64_t start = now_ms();
	char address[96];
	afd_transport *net;

	rig_address(address);
	net = make_client(address, &params);
	expect_error(afd_transport_wait(net, 5000), -ETIMEDOUT, "no FFN peer joined within 120 ms");
	assert_non_null(strstr(afd_last_error(), address));
	assert_non_null(strstr(afd_last_error(), "nobody listens there"));
	assert_in_range(now_ms() - start, 100, 1000);
	expect_error(afd_transport_poll(net), -ETIMEDOUT, address);
	expect_error(begin_step(net, 1), -ETIMEDOUT, address);
	afd_transport_destroy(net);
}

static void a_wait_of_minus_1_only_looks(void **state)
{
	char address[96];
	afd_transport *net;
	uint64_t start = now_ms();

	rig_address(address);
	net = make_client(address, NULL);
	expect_error(afd_transport_wait(net, -1), -ETIMEDOUT, "missing");
	assert_in_range(now_ms() - start, 0, 200);
	afd_transport_destroy(net);
}

static void a_server_that_does_not_answer_the_handshake_is_named_after_the_timeout(void **state)
{
	struct afd_transport_params params = { .connect_timeout_ms = 150 };
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	park(&server);
	net = make_client(server.address, &params);
	expect_error(afd_transport_wait(net, 5000), -ETIMEDOUT, server.address);
	afd_transport_destroy(net);
	server.silent = 0;
	server_stop(&server);
}

/* ---- strangers ---- */

static void connections_that_say_nothing_keep_nobody_out(void **state)
{
	enum { STRANGERS = 200 };
	static struct afd__wire wires[STRANGERS];
	const struct afd__transport_ops *ops = rig_ops();
	struct server server;
	int epoll_fd = epoll_create1(0), n_connected = 0;
	afd_transport *net;

	server_start(&server, NULL);
	for (int i = 0; i < STRANGERS; i++) {
		rig_connect(&wires[i], epoll_fd, server.address);
		n_connected++;
	}
	net = join(&server, NULL);
	run_step(net, 3, 1);
	rig_wait_logged("64 handshakes are under way, and it is the oldest that is silent");
	while (n_connected)
		ops->close(&wires[--n_connected]);
	run_step(net, 3, 1);
	afd_transport_destroy(net);
	server_stop(&server);
	close(epoll_fd);
}

static void strangers_that_talk_nonsense_are_refused_and_logged(void **state)
{
	const struct afd__transport_ops *ops = rig_ops();
	char junk[AFD__HELLO_MAX];
	int epoll_fd = epoll_create1(0);
	struct afd__wire wire;
	struct server server;
	size_t bytes;

	memset(junk, 'j', sizeof(junk));
	server_start(&server, NULL);
	for (int i = 0; i < 3; i++) {
		rig_connect(&wire, epoll_fd, server.address);
		assert_int_equal(ops->hello_send(&wire, junk, i ? sizeof(junk) : 1), 1);
		while (!ops->hello_receive(&wire, junk, sizeof(junk), &bytes))
			sleep_ms(1);
		ops->close(&wire);
	}
	if (!strcmp(rig_scheme(), "tcp") || !strcmp(rig_scheme(), "auto") ||
		!strcmp(rig_scheme(), "verbs")) {
		rig_wait_logged("did not join: handshake: begins with 6a 00");
		rig_wait_logged("did not join: handshake: begins with 6a 6a");
	} else {
		rig_wait_logged("did not join: handshake: 1 bytes came");
		rig_wait_logged("did not join: handshake: magic is 0x6a6a6a6a");
	}
	server_stop(&server);
	close(epoll_fd);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(bad_addresses_are_refused_by_name),
		RIG_TEST(params_out_of_range_are_refused_by_name),
		RIG_TEST(contracts_without_sense_are_refused_by_field),
		RIG_TEST(an_address_in_use_is_refused_and_free_after_its_end),
		RIG_TEST(another_contract_is_refused_by_field_on_both_sides),
		RIG_TEST(a_dtype_that_the_server_does_not_take_is_refused_on_both_sides),
		RIG_TEST(layers_that_the_server_does_not_hold_are_refused_on_both_sides),
		RIG_TEST(one_peer_too_many_is_refused_and_joins_when_there_is_room),
		RIG_TEST(a_refused_client_disturbs_nobody),
		RIG_TEST(a_server_that_comes_late_is_waited_for),
		RIG_TEST(a_server_that_never_comes_is_named_after_the_timeout),
		RIG_TEST(a_wait_of_minus_1_only_looks),
		RIG_TEST(a_server_that_does_not_answer_the_handshake_is_named_after_the_timeout),
		RIG_TEST(connections_that_say_nothing_keep_nobody_out),
		RIG_TEST(strangers_that_talk_nonsense_are_refused_and_logged),
	};
	return RIG_RUN(argc, argv, tests);
}
