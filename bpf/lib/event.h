/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Counters and event records: what was decided, never a sample of the packet. */
#pragma once
#include "packet.h"

static __always_inline void count(__u8 reason, __u8 direction, __u32 octets)
{
	__u32 index = 2 * reason + (direction & 1);
	struct counter *c = bpf_map_lookup_elem(&counters, &index);

	if (c) {
		c->packets++;
		c->bytes += octets;
	}
}

/* The frontend: what the packet was translated from, or what the client is known to have asked. */
static __always_inline void event_service(struct scratch *s, struct event *e)
{
	struct translation *row;

	if (s->service) {
		e->frontend = s->frontend;
		e->frontend_port = s->frontend_port;
		e->service = s->service;
		return;
	}
	if (!(s->flags & CT_SERVICE) || !s->answers || s->p.quoted)
		return;
	translation_key_set(&s->back, &s->p.daddr, s->p.dport, &s->p.saddr, s->p.sport, s->p.protocol,
			    TRANSLATION_BACK);
	row = bpf_map_lookup_elem(&translations, &s->back);
	if (!row)
		return;
	e->frontend = row->addr;
	e->frontend_port = row->port;
	e->service = row->service;
}

static __noinline int event_send(struct scratch *s, __u8 type, __u8 verdict, __u8 reason)
{
	struct event *e;

	if (!s)
		return 0;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		__u32 zero = 0;
		__u64 *lost = bpf_map_lookup_elem(&events_lost, &zero);

		if (lost)
			*lost += 1;
		return 0;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->time = bpf_ktime_get_boot_ns();
	e->saddr = s->p.saddr;
	e->daddr = s->p.daddr;
	e->sport = s->p.sport;
	e->dport = s->p.dport;
	if (is_icmp(&s->p))
		e->sport = bpf_htons(s->p.icmp_type);
	e->protocol = s->p.protocol;
	e->type = type;
	e->verdict = verdict;
	e->reason = reason;
	e->direction = s->direction;
	e->observation = s->observation;
	e->ct_state = s->ct_state;
	e->tcp_flags = s->p.tcp_flags;
	e->identity[0] = s->ends[0].identity;
	e->identity[1] = s->ends[1].identity;
	e->endpoint[0] = s->ends[0].id;
	e->endpoint[1] = s->ends[1].id;
	e->rule[DIR_EGRESS] = s->rule[DIR_EGRESS];
	e->rule[DIR_INGRESS] = s->rule[DIR_INGRESS];
	e->l7 = s->l7;
	e->ifindex = s->ifindex;
	e->length = s->p.length;
	if (type == EVENT_END) {
		e->packets = s->fresh.packets[0] + s->fresh.packets[1];
		e->bytes = s->fresh.bytes[0] + s->fresh.bytes[1];
	}
	event_service(s, e);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* Counts, reports and drops; `error` is a negated drop reason. */
static __always_inline int drop(struct scratch *s, int error)
{
	__u8 reason = -error;

	count(reason, s->direction, s->p.length);
	event_send(s, EVENT_DROP, VERDICT_DROPPED, reason);
	return TC_ACT_SHOT;
}

/* Drops what every interface sends all the time (router solicitations, MLD): counted, not reported. */
static __always_inline int drop_quietly(struct scratch *s, int error)
{
	count(-error, s->direction, s->p.length);
	return TC_ACT_SHOT;
}
