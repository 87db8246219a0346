/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Later fragments have no ports: they take those of their datagram's first fragment. */
#pragma once
#include "packet.h"

#define FRAG_LIFE (30 * 1000000000ULL)

/* Returns 0 with the ports set, or -DROP_FRAG_NOT_FOUND. */
static __noinline int frag_ports(struct scratch *s)
{
	struct frag_key key = {};
	struct frag_entry fresh = {}, *found;

	if (!s)
		return -DROP_INTERNAL;
	key.saddr = s->p.saddr;
	key.daddr = s->p.daddr;
	key.id = s->p.frag_id;
	key.protocol = s->p.family == 4 ? s->p.protocol : 0;
	if (s->p.frag == FRAG_FIRST) {
		fresh.sport = s->p.sport;
		fresh.dport = s->p.dport;
		fresh.protocol = s->p.protocol;
		fresh.expires = s->now + FRAG_LIFE;
		bpf_map_update_elem(&fragments, &key, &fresh, BPF_ANY);
		return 0;
	}
	found = bpf_map_lookup_elem(&fragments, &key);
	if (!found || found->expires < s->now)
		return -DROP_FRAG_NOT_FOUND;
	s->p.sport = found->sport;
	s->p.dport = found->dport;
	s->p.protocol = found->protocol;
	if (is_icmp(&s->p)) /* only echoes are long enough to be fragmented */
		s->p.icmp_type = s->p.family == 4 ? ICMP_ECHO : ICMPV6_ECHO_REQUEST;
	return 0;
}
