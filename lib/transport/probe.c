/* SPDX-License-Identifier: Apache-2.0 */
/*
 * afd_transport_probe: a survey (survey.c) by a transport that is made for it, with one link that
 * never joins, and the table of what it found beside what this build and machine can carry at all.
 */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "net.h"

enum { DEFAULT_TIMEOUT_MS = 10000 };

static const uint64_t MS = 1000000;

enum { N_ALL = AFD__N_BACKENDS + AFD__N_ABSENT_BACKENDS };
_Static_assert(N_ALL <= AFD_MAX_BACKENDS, "transport.h promises so");

struct probe {
	afd_context *ctx;
	struct afd__address address;
	struct afd_probe_params params;
	struct afd_probe_backend table[N_ALL];
	afd_transport *net; /* NULL: it could not be made */
	struct afd__survey *survey;
};

static int name_error(const struct probe *p, int rc)
{
	return afd__error_prefix(rc, "probe %s", p->address.text);
}

/* ---- the table ---- */

static void state_machine(struct probe *p)
{
	for (uint32_t i = 0; i < N_ALL; i++) {
		struct afd_probe_backend *b = &p->table[i];

		*b = (struct afd_probe_backend){ 0 };
		snprintf(b->scheme, sizeof(b->scheme), "%s",
			i < AFD__N_BACKENDS ? afd__backends[i]->scheme
					    : afd__absent_backends[i - AFD__N_BACKENDS]);
		b->machine = i < AFD__N_BACKENDS
				     ? afd__backends[i]->probe(p->ctx)
				     : afd__error(-ENOSYS, "is not part of this build");
		b->error = b->machine;
		if (b->error)
			afd__error_save(b->text, sizeof(b->text));
	}
}

static void say_why_not(struct probe *p, struct afd_probe_backend *b, int error)
{
	const struct afd__trial *first = p->survey ? &p->survey->trials[0] : NULL;
	bool is_auto = p->address.ops == &afd__transport_auto;
	const char *why = "the listener does not offer it";

	if (!is_auto || !strcmp(b->scheme, "loop"))
		why = is_auto ? "is within one context only" : "the address is of another";
	else if (!strcmp(b->scheme, "verbs") && p->params.tls)
		why = "rows cannot be encrypted there";
	else if (first && first->error)
		why = first->text;
	else if (!first)
		why = "was not tried";
	b->error = is_auto && first && first->error ? first->error : error;
	snprintf(b->text, sizeof(b->text), "%s", why);
}

static void take_trial(struct afd_probe_backend *b, const struct afd__trial *t)
{
	b->error = t->error;
	snprintf(b->address, sizeof(b->address), "%s", t->address.text);
	snprintf(b->text, sizeof(b->text), "%s", t->error ? t->text : "");
	b->round_trip_us = t->error ? 0 : t->round_trip_us;
	b->bytes_per_second = t->error ? 0 : t->bytes_per_second;
}

/* Of auto: the text begins with that, but what is tried there is tcp:. */
static bool is_of(const struct afd__trial *t, const struct afd_probe_backend *b)
{
	size_t bytes = strlen(b->scheme);

	if (t->address.ops)
		return !strcmp(t->address.ops->scheme, b->scheme);
	return !strncmp(t->address.text, b->scheme, bytes) && t->address.text[bytes] == ':';
}

static void state_trials(struct probe *p)
{
	const struct afd__survey *s = p->survey;

	for (uint32_t i = 0; i < N_ALL; i++) {
		struct afd_probe_backend *b = &p->table[i];
		const struct afd__trial *t = NULL;

		for (uint32_t k = 0; s && k < s->n_trials; k++) {
			if (s->trials[k].tried && is_of(&s->trials[k], b))
				t = &s->trials[k];
		}
		if (t)
			take_trial(b, t);
		else if (!b->error)
			say_why_not(p, b, -ENOTSUP);
	}
}

static int32_t find_chosen(const struct probe *p)
{
	const struct afd__survey *s = p->survey;

	for (int32_t i = 0; s && i < N_ALL; i++) {
		if (is_of(&s->trials[s->at], &p->table[i]) && !p->table[i].error)
			return i;
	}
	return -1;
}

/* ---- the survey ---- */

static int make_link(struct probe *p)
{
	const char *text = p->address.text;
	struct afd_transport_params params = { .size = sizeof(params),
		.connect = &text,
		.n_connect = 1,
		.connect_timeout_ms = UINT32_MAX,
		.key_file = p->params.key_file,
		.key = p->params.key,
		.key_bytes = p->params.key_bytes,
		.tls = p->params.tls };
	struct afd_contract contract = {
		.size = sizeof(contract), .hidden_size = 1, .n_layers = 1, .dtype = AFD_DTYPE_F32
	};
	struct afd__link *link;
	int rc = afd_transport_create(&p->net, p->ctx, &contract, &params);

	if (rc)
		return rc;
	link = p->net->links[0];
	rc = link->survey ? 0 : afd__survey_create(link);
	if (rc)
		return rc;
	snprintf(link->who, sizeof(link->who), "the listener");
	link->survey->measures = true;
	p->survey = link->survey;
	return 0;
}

/* What is under way when the time is over, and what would have come after it, was not proved. */
static void run_out(struct probe *p, uint32_t timeout_ms)
{
	struct afd__link *link = p->net->links[0];

	while (!p->survey->done)
		afd__survey_end_trial(
			link, afd__error(-ETIMEDOUT, "%s: no answer in %u ms", link->via->text,
				      timeout_ms));
}

static int make_survey(struct probe *p)
{
	uint32_t timeout_ms = p->params.timeout_ms ? p->params.timeout_ms : DEFAULT_TIMEOUT_MS;
	uint64_t now = afd__now_ns(), until = now + timeout_ms * MS;
	int rc = 0;

	while (rc >= 0 && now < until) {
		uint64_t left_ms = (until - now + MS - 1) / MS;

		rc = afd__net_settle(p->net);
		if (p->survey->done)
			return 0;
		if (rc >= 0)
			rc = afd__transport_sleep(
				p->net, -1, left_ms > INT32_MAX ? INT32_MAX : (int32_t)left_ms);
		now = afd__now_ns();
	}
	if (rc >= 0)
		run_out(p, timeout_ms);
	return rc < 0 ? rc : 0;
}

static int survey_error(const struct probe *p)
{
	const struct afd__trial *first = &p->survey->trials[0];

	return afd__error(first->error ? first->error : -EIO, "%s", first->text);
}

static int run_probe(struct probe *p, int32_t *chosen)
{
	char text[512];
	int rc;

	state_machine(p);
	rc = make_link(p);
	if (!rc)
		rc = make_survey(p);
	afd__error_save(text, sizeof(text));
	state_trials(p);
	*chosen = rc ? -1 : find_chosen(p);
	if (rc)
		rc = afd__error(rc, "%s", text);
	else if (*chosen < 0)
		rc = survey_error(p);
	return rc;
}

/* ---- what hosts call ---- */

static int give(const struct probe *p, struct afd_probe *out, struct afd_probe *asked, int32_t chosen)
{
	int rc = 0;

	for (uint32_t i = 0; i < N_ALL && !rc; i++) {
		uint8_t *at = (uint8_t *)asked->backends + (size_t)i * asked->backend_bytes;

		memset(at, 0, asked->backend_bytes);
		memcpy(at, &p->table[i],
			asked->backend_bytes < sizeof(p->table[i]) ? asked->backend_bytes
								   : sizeof(p->table[i]));
	}
	asked->n_backends = N_ALL;
	asked->chosen = chosen;
	return afd__params_give(out, asked, sizeof(*asked), "probe");
}

static int check(const char *address, const struct afd_probe_params *params,
	const struct afd_probe *out, struct probe *p, struct afd_probe *asked)
{
	int rc = 0;

	if (!address || !out)
		return afd__error(-EINVAL, "probe: %s is NULL", address ? "out" : "address");
	rc = afd__params_copy(asked, sizeof(*asked), out, "probe");
	if (!rc && params)
		rc = afd__params_copy(&p->params, sizeof(p->params), params, "probe params");
	if (rc)
		return rc;
	if (!asked->backends || asked->backend_bytes < offsetof(struct afd_probe_backend, address))
		return afd__error(-EINVAL, "probe: backends is %s, backend_bytes is %u, must be %zu",
			asked->backends ? "given" : "NULL", asked->backend_bytes,
			sizeof(struct afd_probe_backend));
	if (asked->max_backends < N_ALL)
		return afd__error(-ENOSPC, "probe: max_backends is %u, there are %d",
			asked->max_backends, N_ALL);
	return afd__address_read(&p->address, p->ctx, address, false);
}

int afd_transport_probe(afd_context *ctx, const char *address,
	const struct afd_probe_params *params, struct afd_probe *out)
{
	struct afd_probe asked;
	struct probe *p = NULL;
	int32_t chosen = -1;
	bool is_tried;
	char text[512];
	int rc = afd__context_check(ctx, "probe: its context");

	if (rc)
		return rc;
	p = afd__alloc(ctx, 1, sizeof(*p));
	if (!p)
		return -ENOMEM;
	p->ctx = ctx;
	rc = check(address, params, out, p, &asked);
	if (!rc) {
		rc = run_probe(p, &chosen);
		if (rc)
			rc = name_error(p, rc);
		afd__error_save(text, sizeof(text));
		is_tried = p->survey;
		afd_transport_destroy(p->net);
		/* Params that no transport takes change nothing. */
		if ((rc != -EINVAL || is_tried) && !give(p, out, &asked, chosen) && rc)
			afd__error(rc, "%s", text);
	}
	afd__free(p);
	return rc;
}
