/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The proof of a key. Both sides say a nonce first; from then on each message of the handshake ends
 * in a MAC over the chain of all that was said before, the speaker's side and the message, so that
 * neither another key, nor a replay, nor a changed or reflected byte goes further than the check
 * below. A message is parsed only behind it.
 *
 * Called by handshake.c, and by a backend for its own messages. Without a key nothing here changes a message.
 */
#include <string.h>

#include "net.h"

enum { PREFIX_BYTES = 12, FIELD_BYTES = 4, TAG_NONCE = 64, TAG_PROOF = 65 };
enum { NONCE_MESSAGE_BYTES = PREFIX_BYTES + FIELD_BYTES + AFD__MAC_BYTES };

_Static_assert(NONCE_MESSAGE_BYTES == (int)AFD__NONCE_MESSAGE_BYTES &&
		       FIELD_BYTES + (int)AFD__MAC_BYTES == AFD__SEAL_BYTES,
	"net.h and ops.h reserve as many");

static const char label[] = "afd handshake 1";

/* The chain's next value: over the last one, who speaks, and the message. */
static int chain(const struct afd__link *link, bool accepting, const void *message, size_t bytes,
	uint8_t out[AFD__MAC_BYTES])
{
	const struct afd__secret *secret = link->net->secret;
	uint8_t side = accepting;
	struct iovec parts[3] = { { (void *)link->chain, sizeof(link->chain) }, { &side, 1 },
		{ (void *)message, bytes } };

	if (secret->ops->mac(out, secret->key, secret->key_bytes, parts, 3))
		return afd__error(-EIO, "key: HMAC-SHA256 failed");
	return 0;
}

/* When both nonces are known. */
static int start_chain(struct afd__link *link)
{
	const struct afd__secret *secret = link->net->secret;
	bool accepted = !link->address;
	struct iovec parts[3] = { { (void *)label, sizeof(label) },
		{ accepted ? link->nonce_there : link->nonce_here, NONCE_MESSAGE_BYTES },
		{ accepted ? link->nonce_here : link->nonce_there, NONCE_MESSAGE_BYTES } };

	if (secret->ops->mac(link->chain, secret->key, secret->key_bytes, parts, 3))
		return afd__error(-EIO, "key: HMAC-SHA256 failed");
	link->sealed = true;
	return 0;
}

int afd__prove_begin(struct afd__link *link)
{
	uint8_t *out = link->nonce_here;

	link->sealed = false;
	afd__hello_prefix(out, AFD__NONCE, NONCE_MESSAGE_BYTES);
	afd__put16(out + PREFIX_BYTES, TAG_NONCE);
	afd__put16(out + PREFIX_BYTES + 2, AFD__MAC_BYTES);
	if (link->net->secret->ops->random(out + PREFIX_BYTES + FIELD_BYTES, AFD__MAC_BYTES))
		return afd__error(-EIO, "key: no random numbers");
	memcpy(link->message, out, NONCE_MESSAGE_BYTES);
	link->message_bytes = NONCE_MESSAGE_BYTES;
	return 0;
}

int afd__prove_nonce(struct afd__link *link, const uint8_t *message, size_t bytes)
{
	if (bytes != NONCE_MESSAGE_BYTES || afd__take16(message + PREFIX_BYTES) != TAG_NONCE ||
		afd__take16(message + PREFIX_BYTES + 2) != AFD__MAC_BYTES)
		return afd__error(-EPROTO, "handshake: a nonce of %zu bytes came, must have %d", bytes,
			NONCE_MESSAGE_BYTES);
	memcpy(link->nonce_there, message, NONCE_MESSAGE_BYTES);
	return start_chain(link);
}

static int seal(struct afd__link *link, uint8_t *out, size_t *bytes)
{
	size_t covered = *bytes + FIELD_BYTES;
	int rc;

	if (!link->sealed)
		return 0;
	afd__put32(out + 8, (uint32_t)(*bytes + AFD__SEAL_BYTES));
	afd__put16(out + *bytes, TAG_PROOF);
	afd__put16(out + *bytes + 2, AFD__MAC_BYTES);
	rc = chain(link, !link->address, out, covered, link->chain);
	if (rc)
		return rc;
	memcpy(out + covered, link->chain, AFD__MAC_BYTES);
	*bytes += AFD__SEAL_BYTES;
	return 0;
}

int afd__prove_seal(struct afd__link *link)
{
	return seal(link, link->message, &link->message_bytes);
}

int afd__prove_check(struct afd__link *link, const uint8_t *message, size_t bytes)
{
	uint8_t wanted[AFD__MAC_BYTES];
	int rc;

	if (!link->sealed)
		return 0;
	if (bytes < PREFIX_BYTES + AFD__SEAL_BYTES)
		return afd__error(-EACCES, "%s proves no key", link->who);
	rc = chain(link, !!link->address, message, bytes - AFD__MAC_BYTES, wanted);
	if (rc)
		return rc;
	if (!link->net->secret->ops->equal(
		    wanted, message + bytes - AFD__MAC_BYTES, AFD__MAC_BYTES))
		return afd__error(-EACCES, "%s does not prove our key", link->who);
	memcpy(link->chain, wanted, sizeof(link->chain));
	return 0;
}

/* ---- messages of a backend ---- */

static int seal_other(void *user, uint8_t *message, size_t *bytes)
{
	return seal(user, message, bytes);
}

static int check_other(void *user, const uint8_t *message, size_t *bytes)
{
	const struct afd__link *link = user;
	int rc = afd__prove_check(user, message, *bytes);

	if (!rc && link->sealed)
		*bytes -= AFD__SEAL_BYTES;
	return rc;
}

struct afd__wire_proof afd__prove_wire(struct afd__link *link)
{
	return (struct afd__wire_proof){ .seal = seal_other, .check = check_other, .user = link };
}
