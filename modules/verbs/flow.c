/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Slots on their way. A slot crosses as one chain: an RDMA WRITE of its payload, then a WRITE WITH
 * IMMEDIATE of its record and header, whose arrival says that all is there. The record carries the
 * slots that are given back, so that a request and its reply are one chain each; a slot that
 * somebody waits for alone goes back by an immediate without bytes.
 *
 * The peer is held against our own account of who has which slot; the record is copied out before it
 * is looked at, since the peer can write it at any time.
 */
#include <assert.h>
#include <string.h>

#include "lib/transport/slots.h"
#include "verbs.h"

/* What the 32 bits of an immediate say. */
enum { KIND_SLOT = 1, KIND_RETURN = 2 };

static uint32_t immediate(uint32_t kind, uint32_t slot, uint32_t sequence)
{
	return kind | slot << 8 | sequence << 16;
}

/* Serial 32 bits, send 1, rail 4, index 12; hub.c takes it apart. */
uint64_t verbs_request_id(const struct end *end, uint32_t rail, bool is_send)
{
	return (uint64_t)end->serial << 32 | (uint64_t)is_send << 16 | rail << 12 | end->index;
}

/* ---- where slots lie ---- */

static size_t offset_of(const struct end *end, uint32_t slot)
{
	return afd__slot_offset(&end->geometry, slot, RECORD_BYTES);
}

size_t verbs_direction_bytes(const struct afd__wire_slots *g)
{
	size_t rows, bytes;

	if (!g->n_slots || g->n_slots > AFD__SLOTS_MAX || g->n_control > g->n_slots ||
		!g->control_bytes || g->control_bytes > UINT16_MAX || !g->slot_bytes ||
		g->slot_bytes > UINT32_MAX - RECORD_BYTES ||
		__builtin_mul_overflow(
			g->n_slots - g->n_control, RECORD_BYTES + g->slot_bytes, &rows) ||
		__builtin_add_overflow(
			rows, g->n_control * (RECORD_BYTES + g->control_bytes), &bytes) ||
		bytes > SIZE_MAX / 4)
		return 0;
	return bytes;
}

/* A slot each way at once, and its return. */
uint32_t verbs_receive_depth(const struct afd__wire_slots *geometry)
{
	return 2 * geometry->n_slots;
}

uint32_t verbs_send_depth(const struct afd__wire_slots *geometry)
{
	return 4 * geometry->n_slots;
}

static uint8_t *send_memory(const struct end *end, uint32_t slot)
{
	return end->memory + offset_of(end, slot);
}

static uint8_t *receive_memory(const struct end *end, uint32_t slot)
{
	return end->memory + end->direction_bytes + offset_of(end, slot);
}

void *verbs_send_slot(void *end, uint32_t slot)
{
	return send_memory(end, slot);
}

const void *verbs_receive_slot(void *end, uint32_t slot)
{
	return receive_memory(end, slot);
}

void *verbs_memory(void *opaque, size_t *bytes)
{
	struct end *end = opaque;

	*bytes = end->area->bytes;
	return end->memory;
}

void *verbs_rows(void *opaque, uint32_t slot, bool to_send)
{
	struct end *end = opaque;
	uint8_t *memory = end->device ? end->device_memory : end->memory;

	return memory + (to_send ? 0 : end->direction_bytes) + offset_of(end, slot) + HEADER_BYTES;
}

/* ---- the end of it ---- */

void verbs_end_fail(struct end *end, int rc)
{
	if (end->error)
		return;
	end->error = rc;
	end->hub->host->error_save(end->error_text, sizeof(end->error_text));
}

static int error_of(const struct end *end)
{
	return end->hub->host->error(end->error, "%s", end->error_text);
}

bool verbs_is_quiet(const struct end *end)
{
	for (uint32_t i = 0; i < end->n_rails; i++) {
		if (end->rails[i].n_chains)
			return false;
	}
	return !end->n_queued;
}

/* ---- out ---- */

static int post(struct end *end, struct rail *rail, struct ibv_send_wr *chain, uint32_t n)
{
	struct ibv_send_wr *bad;
	int rc = ibv_post_send(rail->qp, chain, &bad);

	if (rc) {
		verbs_end_fail(end,
			end->hub->host->error(-EIO, "verbs: device %s: a request was not taken: %s",
				rail->nic->name, strerror(rc)));
		return end->error;
	}
	rail->room -= n;
	rail->chains[(rail->chain_head + rail->n_chains++) % (4 * AFD__SLOTS_MAX)] = (uint16_t)n;
	return 0;
}

static void fill_record(struct end *end, uint32_t slot, uint32_t bytes)
{
	struct record *record = (struct record *)(send_memory(end, slot) - RECORD_BYTES);

	*record = (struct record){
		.slot = slot, .bytes = bytes, .sequence = end->sequence_out++
	};
	memcpy(record->returned, end->returned, sizeof(record->returned));
	memset(end->returned, 0, sizeof(end->returned));
	end->urgent = false;
}

/* Of a slot's payload, [bytes] from `at` of the slot on: a WRITE, which `next` follows. The address
 * is the area's also where rows are registered apart. */
struct payload {
	struct ibv_sge part;
	struct ibv_send_wr request;
};

static void write_payload(struct payload *payload, const struct end *end,
	uint32_t index, uint32_t slot, uint32_t at, uint32_t bytes)
{
	*payload = (struct payload){
		.part = { (uintptr_t)send_memory(end, slot) + at, bytes, 0 },
		.request = { .wr_id = verbs_request_id(end, index, true),
			.sg_list = &payload->part,
			.num_sge = 1,
			.opcode = IBV_WR_RDMA_WRITE,
			.wr.rdma = { end->peer_memory + offset_of(end, slot) + at, 0 } },
	};
}

/* Rows, what is no rows, then record and header: a request each, where there is such a thing. The
 * first two are one unless rows lie apart here or there. */
static int post_slot(
	struct end *end, uint32_t index, uint32_t slot, uint32_t bytes, uint32_t rows_bytes)
{
	struct rail *rail = &end->rails[index];
	const struct chunk *chunk = end->area->chunk;
	size_t nic = (size_t)(rail->nic - end->hub->nics), offset = offset_of(end, slot);
	uint32_t head = bytes < HEADER_BYTES ? bytes : HEADER_BYTES, n = 1;
	uint8_t *memory = send_memory(end, slot);
	bool apart = rail->rows || rail->rows_apart;
	uint32_t first = apart ? rows_bytes : bytes - head;
	struct payload rows, rest;
	struct ibv_send_wr *chain;
	struct ibv_sge headers = { (uintptr_t)memory - RECORD_BYTES, RECORD_BYTES + head,
		chunk->header[nic]->lkey };
	struct ibv_send_wr header = { .wr_id = verbs_request_id(end, index, true),
		.sg_list = &headers,
		.num_sge = 1,
		.opcode = IBV_WR_RDMA_WRITE_WITH_IMM,
		.send_flags = IBV_SEND_SIGNALED,
		.wr.rdma = { end->peer_memory + offset - RECORD_BYTES, rail->header_key } };

	fill_record(end, slot, bytes);
	header.imm_data = immediate(KIND_SLOT, slot,
		((struct record *)(memory - RECORD_BYTES))->sequence);
	if (RECORD_BYTES + head <= rail->max_inline)
		header.send_flags |= IBV_SEND_INLINE;
	chain = &header;
	if (bytes - head > first) {
		write_payload(&rest, end, index, slot, head + first, bytes - head - first);
		rest.part.lkey = chunk->payload[nic]->lkey;
		rest.request.wr.rdma.rkey = rail->header_key;
		rest.request.next = chain;
		chain = &rest.request;
		n++;
	}
	if (first) {
		write_payload(&rows, end, index, slot, head, first);
		rows.part.lkey = rail->rows ? rail->rows->lkey : chunk->payload[nic]->lkey;
		rows.request.wr.rdma.rkey = rail->payload_key;
		rows.request.next = chain;
		chain = &rows.request;
		n++;
	}
	return post(end, rail, chain, n);
}

/* One slot goes back without waiting for a record. */
static int post_return(struct end *end, uint32_t slot)
{
	struct ibv_send_wr request = { .wr_id = verbs_request_id(end, 0, true),
		.opcode = IBV_WR_RDMA_WRITE_WITH_IMM,
		.send_flags = IBV_SEND_SIGNALED,
		.imm_data = immediate(KIND_RETURN, slot, 0),
		.wr.rdma = { end->peer_memory, end->rails[0].header_key } };

	end->returned[slot / 8] &= (uint8_t) ~(1u << slot % 8);
	return post(end, &end->rails[0], &request, 1);
}

static void flush_slots(struct end *end)
{
	while (end->n_queued && !end->error) {
		uint32_t slot = end->queue[end->queue_head].slot, rail = rail_of(end, slot);

		if (end->rails[rail].room < 3 ||
			post_slot(end, rail, slot, end->queue[end->queue_head].bytes,
				end->queue[end->queue_head].rows_bytes))
			return;
		end->queue_head = (end->queue_head + 1) % AFD__SLOTS_MAX;
		end->n_queued--;
	}
}

static void flush_returns(struct end *end)
{
	for (uint32_t slot = 0; slot < end->geometry.n_slots && end->urgent; slot++) {
		if (!(end->returned[slot / 8] >> slot % 8 & 1))
			continue;
		if (end->error || !end->rails[0].room || post_return(end, slot))
			return;
	}
	end->urgent = false;
}

int verbs_post_rows(void *opaque, uint32_t slot, uint32_t bytes, uint32_t rows_bytes)
{
	struct end *end = opaque;
	uint32_t tail = (end->queue_head + end->n_queued) % AFD__SLOTS_MAX;

	assert(bytes && bytes <= afd__slot_capacity(&end->geometry, slot));
	assert(!rows_bytes || rows_bytes <= bytes - HEADER_BYTES);
	if (end->error)
		return error_of(end);
	/* Its return may wait behind a request that was polled. */
	if (!end->ours[slot])
		verbs_drain(end->hub);
	if (!end->ours[slot])
		return -EAGAIN;
	end->ours[slot] = false;
	end->queue[tail].slot = (uint16_t)slot;
	end->queue[tail].bytes = bytes;
	end->queue[tail].rows_bytes = rows_bytes;
	end->n_queued++;
	flush_slots(end);
	return 0;
}

int verbs_post_receive(void *opaque, uint32_t slot)
{
	struct end *end = opaque;

	if (end->error)
		return error_of(end);
	assert(end->held[slot]);
	end->held[slot] = false;
	end->returned[slot / 8] |= (uint8_t)(1u << slot % 8);
	if (slot < end->geometry.n_control || end->geometry.eager)
		end->urgent = true;
	return 0;
}

/* ---- in ---- */

int verbs_post_receives(struct end *end, uint32_t rail, uint32_t n)
{
	struct ibv_recv_wr request = { .wr_id = verbs_request_id(end, rail, false) }, *bad;
	int rc = 0;

	while (n-- && !rc)
		rc = ibv_post_recv(end->rails[rail].qp, &request, &bad);
	return rc ? end->hub->host->error(-EIO, "verbs: device %s: a receive was not taken: %s",
			    end->rails[rail].nic->name, strerror(rc))
		  : 0;
}

static void complete(struct end *end, int kind, uint32_t slot, uint32_t bytes)
{
	assert(end->n_done < DONE_MAX);
	end->done[(end->done_head + end->n_done++) % DONE_MAX] =
		(struct afd__completion){ .kind = kind, .slot = slot, .bytes = bytes };
}

static int take_return(struct end *end, uint32_t slot)
{
	if (slot >= end->geometry.n_slots || end->ours[slot])
		return end->hub->host->error(
			-EPROTO, "the peer gave back slot %u, which it did not hold", slot);
	end->ours[slot] = true;
	complete(end, AFD__SENT, slot, 0);
	return 0;
}

static int take_returns(struct end *end, const struct record *record)
{
	int rc = 0;

	for (uint32_t i = 0; i < sizeof(record->returned) && !rc; i++) {
		for (uint32_t bit = 0; record->returned[i] >> bit && !rc; bit++) {
			if (record->returned[i] >> bit & 1)
				rc = take_return(end, i * 8 + bit);
		}
	}
	return rc;
}

/* What other rails still bring may be older. */
static void deliver(struct end *end)
{
	uint32_t at = end->sequence_in % AFD__SLOTS_MAX;

	while (end->arrived[at].here) {
		end->arrived[at].here = false;
		complete(end, AFD__RECEIVED, end->arrived[at].slot, end->arrived[at].bytes);
		at = ++end->sequence_in % AFD__SLOTS_MAX;
	}
}

static int take_slot(struct end *end, uint32_t slot)
{
	struct record record;
	uint32_t at;

	if (slot >= end->geometry.n_slots || end->held[slot])
		return end->hub->host->error(
			-EPROTO, "the peer sent slot %u, which it did not have", slot);
	memcpy(&record, receive_memory(end, slot) - RECORD_BYTES, sizeof(record));
	if (record.slot != slot || !record.bytes ||
		record.bytes > afd__slot_capacity(&end->geometry, slot))
		return end->hub->host->error(-EPROTO,
			"the peer sent %u bytes in slot %u, whose record says slot %u, limit %zu",
			record.bytes, slot, record.slot, afd__slot_capacity(&end->geometry, slot));
	at = record.sequence % AFD__SLOTS_MAX;
	if (record.sequence - end->sequence_in >= end->geometry.n_slots || end->arrived[at].here)
		return end->hub->host->error(-EPROTO,
			"the peer sent slot %u as number %u, must be %u or a little more", slot,
			record.sequence, end->sequence_in);
	end->held[slot] = true;
	end->arrived[at].slot = (uint16_t)slot;
	end->arrived[at].bytes = record.bytes;
	end->arrived[at].here = true;
	deliver(end);
	return take_returns(end, &record);
}

static int take_arrival(struct end *end, uint32_t rail, const struct ibv_wc *wc)
{
	uint32_t kind = wc->imm_data & 0xff, slot = wc->imm_data >> 8 & 0xff;
	int rc;

	if (wc->opcode != IBV_WC_RECV_RDMA_WITH_IMM || !(wc->wc_flags & IBV_WC_WITH_IMM))
		return end->hub->host->error(
			-EPROTO, "the peer sent a completion of kind %d", wc->opcode);
	rc = verbs_post_receives(end, rail, 1);
	if (rc)
		return rc;
	if (kind == KIND_SLOT)
		return take_slot(end, slot);
	if (kind == KIND_RETURN)
		return take_return(end, slot);
	return end->hub->host->error(-EPROTO, "the peer sent an immediate of kind %u", kind);
}

static int wc_error(const struct end *end, const struct rail *rail, const struct ibv_wc *wc)
{
	/* What follows the first error is flushed and says nothing. */
	if (wc->status == IBV_WC_RETRY_EXC_ERR || wc->status == IBV_WC_REM_ACCESS_ERR ||
		wc->status == IBV_WC_WR_FLUSH_ERR)
		return end->hub->host->error(-ECONNRESET, "the peer is gone (device %s: %s)",
			rail->nic->name, ibv_wc_status_str(wc->status));
	return end->hub->host->error(-ECONNRESET, "device %s: %s (vendor's number %u)",
		rail->nic->name, ibv_wc_status_str(wc->status), wc->vendor_err);
}

void verbs_take_completion(struct end *end, uint32_t index, bool is_send, const struct ibv_wc *wc)
{
	struct rail *rail = &end->rails[index];
	int rc = 0;

	if (end->error || !rail->qp)
		return;
	if (wc->status != IBV_WC_SUCCESS) {
		rc = wc_error(end, rail, wc);
	} else if (is_send) {
		assert(rail->n_chains);
		rail->room += rail->chains[rail->chain_head];
		rail->chain_head = (rail->chain_head + 1) % (4 * AFD__SLOTS_MAX);
		rail->n_chains--;
	} else {
		rc = take_arrival(end, index, wc);
	}
	if (rc)
		verbs_end_fail(end, rc);
}

int verbs_poll(void *opaque, struct afd__completion *out, int max)
{
	struct end *end = opaque;
	int n = 0;

	verbs_drain(end->hub);
	flush_slots(end);
	flush_returns(end);
	while (n < max && end->n_done) {
		out[n++] = end->done[end->done_head];
		end->done_head = (end->done_head + 1) % DONE_MAX;
		end->n_done--;
	}
	return n || !end->error ? n : error_of(end);
}

int verbs_ready(void *opaque)
{
	struct end *end = opaque;

	if (!end->n_done && !end->error)
		verbs_drain(end->hub);
	return end->n_done || end->error;
}

int verbs_arm(void *opaque)
{
	struct end *end = opaque;

	flush_slots(end);
	flush_returns(end);
	verbs_arm_hub(end->hub);
	return end->n_done || end->error;
}
