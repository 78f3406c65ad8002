/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The slots of a transport's links and the device of the stage that owns it: memory of the host
 * that slots lie in is registered with the device while its link lives, and the transport is told
 * whether rows may lie in memory of the device.
 *
 * Called by both stages at creation; the transport calls back when links bind and close.
 */
#include "../transport/exchange.h"
#include "device.h"

/* Where the device cannot read and write them, it says so and they bounce. */
static void slots_added(void *user, void *memory, size_t bytes)
{
	(void)afd__device_register(user, memory, bytes, "the slots of a link");
}

static void slots_removed(void *user, void *memory, size_t bytes)
{
	afd__device_unregister(user, memory, bytes);
}

void afd__device_watch_slots(struct afd__device *dev, struct afd_transport *net)
{
	const struct afd__slot_memory watch = {
		.added = slots_added,
		.removed = slots_removed,
		.user = dev,
		.device = afd__device_can_be_reached(dev) ? dev : NULL,
	};

	afd__transport_watch_slots(net, &watch);
}
