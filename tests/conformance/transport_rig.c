/* SPDX-License-Identifier: Apache-2.0 */
/* See transport_rig.h. */
#include "transport_rig.h"

#include <dirent.h>
#include <netinet/in.h>
#include <stdio.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "../../kernels/cpu/kernels.h"
#include "../../lib/transport/hello.h"
#include "lossy.h"

enum { PORT_FIRST = 19984, PORT_PLACES = 1597, PORT_STEP = 8 };

afd_context *server_ctx, *client_ctx;
struct afd_contract rig_contract;
uint64_t rig_weights[2], rig_weights_epoch;

static const char *backend = "loop";
static int n_addresses;
static struct server *running; /* what a test that failed has left */

/* ---- the log ---- */

static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static char log_text[1 << 16];
static size_t log_bytes;

static void keep_line(void *user, int32_t level, const char *text)
{
	pthread_mutex_lock(&log_lock);
	if (log_bytes + strlen(text) + 2 < sizeof(log_text))
		log_bytes += (size_t)sprintf(log_text + log_bytes, "%s\n", text);
	pthread_mutex_unlock(&log_lock);
}

void rig_skip_when_emulated(void)
{
	if (getenv("AFD_TEST_EMULATED"))
		rig_skip("the time of an emulated processor says nothing");
}

bool rig_logged(const char *text)
{
	bool found;

	pthread_mutex_lock(&log_lock);
	found = strstr(log_text, text);
	pthread_mutex_unlock(&log_lock);
	return found;
}

void rig_wait_logged(const char *text)
{
	for (int i = 0; i < 400 && !rig_logged(text); i++)
		sleep_ms(5);
	if (!rig_logged(text))
		fail_msg("not logged: \"%s\"; the log is:\n%s", text, log_text);
}

/* ---- contexts ---- */

static bool has_one_context(void)
{
	return strcmp(backend, "shm") && strcmp(backend, "shm-key") && strncmp(backend, "tcp", 3) &&
	       strncmp(backend, "auto", 4) && strncmp(backend, "verbs", 5);
}

static afd_context *make_context(void)
{
	struct afd_context_params params = { .size = sizeof(params),
		.log = { .write = keep_line, .max_level = AFD_LOG_INFO } };
	afd_context *ctx;

	if (afd_context_create(&ctx, &params))
		fail_msg("%s", afd_last_error());
	lossy_add(ctx);
	/* So small that every record crosses in many pieces. */
	if (strstr(backend, "-tiny"))
		ctx->test_socket_bytes = 1;
	return ctx;
}

int rig_begin(void **state)
{
	log_bytes = 0;
	log_text[0] = '\0';
	lossy_begin(0);
	rig_contract = (struct afd_contract){
		.size = sizeof(rig_contract), .hidden_size = HIDDEN, .n_layers = LAYERS
	};
	server_ctx = make_context();
	client_ctx = has_one_context() ? server_ctx : make_context();
	return 0;
}

int rig_end(void **state)
{
	while (running)
		server_stop(running);
	if (client_ctx != server_ctx)
		afd_context_destroy(client_ctx);
	afd_context_destroy(server_ctx);
	return 0;
}

int rig_run(int argc, char **argv, const char *name, const struct CMUnitTest *tests, size_t n_tests)
{
	if (argc > 1)
		backend = argv[1];
	return _cmocka_run_group_tests(name, tests, n_tests, NULL, NULL);
}

const char *rig_scheme(void)
{
	if (!strncmp(backend, "tcp", 3))
		return "tcp";
	if (!strncmp(backend, "verbs", 5))
		return "verbs";
	if (!strncmp(backend, "auto", 4))
		return "auto";
	return strncmp(backend, "shm", 3) ? backend : "shm";
}

const struct afd__transport_ops *rig_ops(void)
{
	/* Strangers come to auto: by what it names. */
	if (!strcmp(rig_scheme(), "tcp") || !strcmp(rig_scheme(), "auto"))
		return &afd__transport_tcp;
	if (!strcmp(rig_scheme(), "verbs"))
		return &afd__transport_verbs;
	return strcmp(rig_scheme(), "shm") ? &afd__transport_loop : &afd__transport_shm;
}

void rig_connect(struct afd__wire *wire, int epoll_fd, const char *address)
{
	static struct afd__tag stranger_tag = { .kind = AFD__TAG_WIRE };

	*wire = (struct afd__wire){
		.ops = rig_ops(), .ctx = client_ctx, .epoll_fd = epoll_fd, .tag = &stranger_tag
	};
	for (int i = 0; i < 5000; i++) {
		int rc = wire->ops->connect(wire, strchr(address, ':') + 1);

		if (rc == 1)
			return;
		if (rc < 0 && rc != -ECONNREFUSED)
			fail_msg("%s: %s", address, afd_last_error());
		sleep_ms(1);
	}
	fail_msg("%s: not connected after 5 s", address);
}

void rig_say(struct afd__wire *wire, const struct afd__hello *hello)
{
	uint8_t message[AFD__HELLO_MAX];
	size_t bytes = afd__hello_encode(message, sizeof(message), hello);

	assert_int_equal(wire->ops->hello_send(wire, message, bytes), 1);
}

int rig_hear(struct afd__wire *wire, struct afd__hello *hello)
{
	uint8_t message[AFD__HELLO_MAX];
	size_t bytes;
	int rc;

	while (!(rc = wire->ops->hello_receive(wire, message, sizeof(message), &bytes)))
		sleep_ms(1);
	return rc == 1 ? afd__hello_decode(hello, message, bytes) : rc;
}

void rig_bind(struct afd__wire *wire, const struct afd__wire_slots *slots)
{
	int rc;

	while (!(rc = wire->ops->bind(wire, slots, 0)))
		sleep_ms(1);
	assert_int_equal(rc, 1);
}

/* A port that nobody has, and as many after it as a test may want: below those that connecting
 * sockets get, and far from where processes that run beside this one look. */
static unsigned free_port(int family)
{
	struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT };
	struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	bool six = family == AF_INET6;
	static unsigned next;
	unsigned port = 0;

	while (!port) {
		int fd = socket(family, SOCK_STREAM, 0), one = 1;

		if (fd < 0)
			fail_msg("no socket of family %d", family);
		if (!next)
			next = PORT_FIRST + (unsigned)getpid() % PORT_PLACES * 987 % PORT_PLACES * PORT_STEP;
		v4.sin_port = v6.sin6_port = htons((uint16_t)next);
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
		if (!bind(fd, six ? (struct sockaddr *)&v6 : (struct sockaddr *)&v4,
			    six ? sizeof(v6) : sizeof(v4)))
			port = next;
		next = (next - PORT_FIRST + PORT_STEP) % (PORT_PLACES * PORT_STEP) + PORT_FIRST;
		close(fd);
	}
	return port;
}

void rig_address(char address[96])
{
	if (!strcmp(backend, "tcp6"))
		snprintf(address, 96, "tcp:[::1]:%u", free_port(AF_INET6));
	else if (!strncmp(backend, "auto", 4))
		snprintf(address, 96, "auto:127.0.0.1:%u", free_port(AF_INET));
	else if (!strncmp(backend, "tcp", 3))
		snprintf(address, 96, "tcp:127.0.0.1:%u", free_port(AF_INET));
	else if (!strcmp(backend, "verbs-two"))
		snprintf(address, 96, "verbs:10.0.0.1:%u?dev=rxe1,rxe2", free_port(AF_INET));
	else if (!strncmp(backend, "verbs", 5))
		snprintf(address, 96, "verbs:127.0.0.1:%u", free_port(AF_INET));
	else
		snprintf(address, 96, "%s:test-%d-%d", rig_scheme(), (int)getpid(),
			n_addresses++);
}

/* ---- numbers of the wire ---- */

float number(const void *rows, size_t i, int32_t dtype)
{
	const uint16_t *half = rows;
	uint32_t bits;
	float value;

	if (dtype == AFD_DTYPE_F32)
		return ((const float *)rows)[i];
	bits = (uint32_t)half[i] << 16;
	/* Whole numbers of f16 are normal: the exponent moves from bias 15 to 127. */
	if (dtype == AFD_DTYPE_F16)
		bits = half[i] & 0x7fff ? (half[i] & 0x8000u) << 16 |
						  (((half[i] & 0x7fffu) << 13) + (112u << 23))
					: 0;
	memcpy(&value, &bits, 4);
	return value;
}

void put_number(void *rows, size_t i, int32_t dtype, float value)
{
	uint16_t *half = rows;
	uint32_t bits;

	memcpy(&bits, &value, 4);
	if (dtype == AFD_DTYPE_F32)
		((float *)rows)[i] = value;
	else if (dtype == AFD_DTYPE_BF16)
		half[i] = (uint16_t)(bits >> 16);
	else
		half[i] = value ? (uint16_t)((bits >> 16 & 0x8000) |
					     (((bits & 0x7fffffff) - (112u << 23)) >> 13))
				: 0;
}

void fill_rows(float *x, uint32_t n_rows, int seed)
{
	for (uint32_t i = 0; i < n_rows * HIDDEN; i++)
		x[i] = (float)((i * 7 + (uint32_t)seed * 13) % 100);
}

void expect_rows(const float *x, const float *y, uint32_t n_rows, int32_t layer)
{
	for (uint32_t i = 0; i < n_rows * HIDDEN; i++) {
		if (y[i] != x[i] + (float)layer + 1)
			fail_msg("row %u, number %u of layer %d: %g, should be %g", i / HIDDEN,
				i % HIDDEN, layer, (double)y[i], (double)x[i] + layer + 1);
	}
}

static void convert_rows(
	const void *src, int32_t src_dtype, void *dst, int32_t dst_dtype, uint32_t n_rows)
{
	struct afd__convert_args args = { .src = src,
		.dst = dst,
		.src_stride = afd__row_bytes(HIDDEN, src_dtype),
		.dst_stride = afd__row_bytes(HIDDEN, dst_dtype),
		.n_rows = n_rows,
		.width = HIDDEN,
		.src_dtype = src_dtype,
		.dst_dtype = dst_dtype };

	afd__cpu_kernels(AFD__ISA_C)->convert(&args, 0, n_rows);
}

void round_rows(float *x, uint32_t n_rows, int32_t dtype)
{
	void *rows = calloc(n_rows, HIDDEN * sizeof(float));

	convert_rows(x, AFD_DTYPE_F32, rows, dtype, n_rows);
	convert_rows(rows, dtype, x, AFD_DTYPE_F32, n_rows);
	free(rows);
}

/* ---- the server ---- */

/* Without the kernel and without memory of its own where no number is rounded: tests count what is
 * allocated. */
static void compute(const struct afd__part *part)
{
	bool fp8 = part->x_dtype == AFD_DTYPE_FP8 || part->y_dtype == AFD_DTYPE_FP8;
	size_t n = (size_t)part->n_rows * HIDDEN;
	float *rows;

	for (size_t i = 0; !fp8 && i < n; i++)
		put_number(part->y, i, part->y_dtype,
			number(part->x, i, part->x_dtype) + (float)part->layer + 1);
	if (!fp8)
		return;
	rows = calloc(n, sizeof(*rows));
	convert_rows(part->x, part->x_dtype, rows, AFD_DTYPE_F32, part->n_rows);
	for (size_t i = 0; i < n; i++)
		rows[i] += (float)part->layer + 1;
	convert_rows(rows, AFD_DTYPE_F32, part->y, part->y_dtype, part->n_rows);
	free(rows);
}

static void answer(struct server *server, const struct afd__part *part)
{
	int status = server->status;

	compute(part);
	if (status)
		afd__error(status, "on purpose");
	afd__exchange_reply(server->net, part, status, server->gather_ns, server->compute_ns);
	server->n_answered++;
}

static void turn(struct server *server)
{
	struct afd__part part;

	if (afd_transport_poll(server->net) < 0)
		abort();
	server->n_joined = (int)afd__exchange_n_joined(server->net);
	while (afd__exchange_take(server->net, &part) > 0) {
		if (server->hold && server->n_held < MANY) {
			server->held[server->n_held] = part;
			server->n_held++; /* whoever sees it may look at the part */
		} else {
			answer(server, &part);
		}
	}
	while (!server->hold && server->n_held)
		answer(server, &server->held[--server->n_held]);
	afd__transport_beat(server->net);
}

static void *serve(void *user)
{
	struct server *server = user;

	while (!server->stop) {
		while (server->silent && !server->stop) {
			server->parked = 1;
			sleep_ms(1);
		}
		server->parked = 0;
		turn(server);
		if (afd__transport_sleep(server->net, -1, 20) < 0)
			abort();
	}
	server->hold = 0;
	turn(server);
	return NULL;
}

/* Every test runs with a key, and over TLS, too. */
void rig_secret(struct afd_transport_params *p)
{
	static const char key[] = "the key of every test";
	bool tls = strstr(backend, "-tls");

	p->size = sizeof(*p);
	if ((!tls && !strstr(backend, "-key")) || p->key || p->key_file)
		return;
	p->key = key;
	p->key_bytes = sizeof(key) - 1;
	p->tls = tls;
}

afd_transport *make_server(const char *address, const struct afd_transport_params *params)
{
	struct afd_transport_params p = params ? *params : (struct afd_transport_params){ 0 };
	afd_transport *net;

	rig_secret(&p);
	p.listen = &address;
	p.n_listen = 1;
	if (afd_transport_create(&net, server_ctx, &rig_contract, &p))
		return NULL;
	if (rig_weights[0])
		afd__transport_state(net, rig_weights, rig_weights_epoch, "c");
	return net;
}

void server_start_at(
	struct server *server, const char *address, const struct afd_transport_params *params)
{
	memset(server, 0, sizeof(*server));
	snprintf(server->address, sizeof(server->address), "%s", address);
	server->net = make_server(address, params);
	if (!server->net)
		fail_msg("%s", afd_last_error());
	server->runs = true;
	server->next = running;
	running = server;
	assert_int_equal(pthread_create(&server->thread, NULL, serve, server), 0);
}

void server_start(struct server *server, const struct afd_transport_params *params)
{
	char address[96];

	rig_address(address);
	server_start_at(server, address, params);
}

void server_stop(struct server *server)
{
	struct server **link = &running;

	if (!server->runs)
		return;
	while (*link != server)
		link = &(*link)->next;
	*link = server->next;
	server->stop = 1;
	pthread_join(server->thread, NULL);
	afd_transport_destroy(server->net);
	server->runs = false;
}

/* ---- clients ---- */

afd_transport *make_client(const char *address, const struct afd_transport_params *params)
{
	struct afd_transport_params p = params ? *params : (struct afd_transport_params){ 0 };
	afd_transport *net;

	rig_secret(&p);
	p.connect = &address;
	p.n_connect = 1;
	if (afd_transport_create(&net, client_ctx, &rig_contract, &p))
		fail_msg("%s", afd_last_error());
	return net;
}

afd_transport *join(const struct server *server, const struct afd_transport_params *params)
{
	afd_transport *net = make_client(server->address, params);

	if (afd_transport_wait(net, 0) != 1)
		fail_msg("%s", afd_last_error());
	return net;
}

void expect_error(int rc, int code, const char *text)
{
	if (rc != code || !strstr(afd_last_error(), text))
		fail_msg("%d \"%s\", should be %d \"%s\"", rc, afd_last_error(), code, text);
}

void expect_done(afd_transport *net, int32_t lane)
{
	if (collect_within(net, lane, 5000) != 1)
		fail_msg("lane %d: %s; the log is:\n%s", lane, afd_last_error(), log_text);
}

int begin_step(afd_transport *net, uint32_t n_rows)
{
	struct afd_step_params step = { .size = sizeof(step) };
	struct afd__exchange_info info;

	afd__transport_info(net, &info);
	for (uint32_t lane = 0; lane < info.lanes; lane++)
		step.n_rows[lane] = n_rows;
	return afd_transport_begin(net, &step);
}

struct afd_frame frame_of(int32_t layer, int32_t lane, uint32_t n_rows, const float *x, float *y)
{
	return (struct afd_frame){ .size = sizeof(struct afd_frame),
		.layer = layer,
		.lane = lane,
		.n_rows = n_rows,
		.x = x,
		.y = y };
}

/* y is x + layer + 1, each rounded as on the wire of the first peer; x becomes that. */
static void expect_exchanged(
	const afd_transport *net, float *x, const float *y, uint32_t n_rows, int32_t layer)
{
	const struct afd_peer_info info = peer_of(net, 0);
	size_t n = (size_t)n_rows * HIDDEN;

	if (info.to_ffn_dtype != AFD_DTYPE_FP8 && info.to_attention_dtype != AFD_DTYPE_FP8) {
		expect_rows(x, y, n_rows, layer);
		return;
	}
	round_rows(x, n_rows, info.to_ffn_dtype);
	for (size_t i = 0; i < n; i++)
		x[i] += (float)layer + 1;
	round_rows(x, n_rows, info.to_attention_dtype);
	assert_memory_equal(y, x, n * sizeof(*x));
}

void run_step(afd_transport *net, uint32_t n_rows, int seed)
{
	float *x = calloc((size_t)n_rows * HIDDEN, sizeof(float)),
	      *y = calloc((size_t)n_rows * HIDDEN, sizeof(float));

	assert_int_equal(begin_step(net, n_rows), 0);
	for (int32_t layer = 0; layer < LAYERS; layer++) {
		struct afd_frame frame = frame_of(layer, 0, n_rows, x, y);

		fill_rows(x, n_rows, seed + layer);
		if (afd_transport_exchange(net, &frame))
			fail_msg("layer %d: %s", layer, afd_last_error());
		expect_exchanged(net, x, y, n_rows, layer);
	}
	free(x);
	free(y);
}

int collect_within(afd_transport *net, int32_t lane, int timeout_ms)
{
	uint64_t until = now_ms() + (uint64_t)timeout_ms;
	int rc;

	while (!(rc = afd_transport_collect(net, lane))) {
		if (now_ms() > until)
			fail_msg("lane %d is not done after %d ms", lane, timeout_ms);
		afd__transport_sleep(net, -1, 10);
	}
	return rc;
}

void wait_for(const _Atomic int *counter, int n)
{
	for (int i = 0; i < 2000 && *counter != n; i++)
		sleep_ms(1);
	if (*counter != n)
		fail_msg("counter is %d after 2 s, should be %d", *counter, n);
}

int rig_holder(const struct server servers[2])
{
	for (int i = 0; i < 2000; i++) {
		for (int s = 0; s < 2; s++) {
			if (servers[s].n_held)
				return s;
		}
		sleep_ms(1);
	}
	fail_msg("no server has rows");
	return 0;
}

void park(struct server *server)
{
	server->silent = 1;
	wait_for(&server->parked, 1);
}

void sleep_ms(int ms)
{
	struct timespec time = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L };

	nanosleep(&time, NULL);
}

uint64_t now_ms(void)
{
	return afd__now_ms();
}

struct afd_peer_info peer_of(const afd_transport *net, uint32_t index)
{
	struct afd_peer_info info = { .size = sizeof(info) };

	assert_int_equal(afd_transport_peer(net, index, &info), 0);
	return info;
}

int count_descriptors(void)
{
	DIR *dir = opendir("/proc/self/fd");
	int n = 0;

	while (readdir(dir))
		n++;
	closedir(dir);
	return n;
}

int settled_descriptors(void)
{
	int n = count_descriptors();

	for (int same = 0, i = 0; same < 10 && i < 400; i++) {
		int now;

		sleep_ms(5);
		now = count_descriptors();
		same = now == n ? same + 1 : 0;
		n = now;
	}
	return n;
}

void expect_descriptors(int n)
{
	for (int i = 0; i < 400 && count_descriptors() != n; i++)
		sleep_ms(5);
	assert_int_equal(count_descriptors(), n);
}
