/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What no node policy may cut off: docs/adr/0009-the-host-is-an-endpoint.md. */
#pragma once
#include "packet.h"

/* Whether the connection of this packet is exempt from the node's policies; `port`: its destination port or ICMP type. */
static __noinline int exempt(struct scratch *s, const union addr *peer, __u8 direction, __be16 port)
{
	struct exemption key = {};

	if (!s || !peer)
		return 0;
	key.peer = *peer;
	key.port = port;
	key.protocol = s->p.protocol;
	key.direction = direction;
	if (bpf_map_lookup_elem(&exemptions, &key))
		return 1;
	key.peer.d[0] = key.peer.d[1] = 0;
	return !!bpf_map_lookup_elem(&exemptions, &key);
}
