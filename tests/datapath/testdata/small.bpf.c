/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A small object for the loader's own tests. */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>

union addr {
	__u8 b[16];
	__be32 w[4];
};

enum colour { COLOUR_RED = 1, COLOUR_BLUE = -2 };

struct value {
	union addr addr;
	__be16 port;
	__u8 mac[6];
	__u32 numbers[2];
	__u64 wide;
};

#ifndef HASH_ENTRIES
#define HASH_ENTRIES 65536
#endif

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, HASH_ENTRIES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct value);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} hash SEC(".maps");

struct lpm_key {
	__u32 prefixlen;
	union addr addr;
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 200000);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct lpm_key);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} trie SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} counters SEC(".maps");

struct event {
	__u64 serial;
	__be16 port;
	__u16 pad;
	__u32 ifindex;
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} events_lost SEC(".maps");

volatile const __u32 config_number __attribute__((btf_decl_tag("a number")));
volatile const bool config_flag __attribute__((btf_decl_tag("a flag")));
volatile const __u16 config_short __attribute__((btf_decl_tag("a short")));
volatile const union addr config_address __attribute__((btf_decl_tag("an address")));
const struct event *exported_event __attribute__((used));
const enum colour *exported_colour __attribute__((used));

/* Returns the configured number; marks the packet with its first octet if the flag is set. */
SEC("tc")
int answer(struct __sk_buff *skb)
{
	skb->cb[0] = config_address.b[15];
	if (config_flag)
		skb->mark = skb->mark + config_short;
	return config_number;
}

/* Counts, and writes one event; each third is discarded. */
SEC("tc")
int tell(struct __sk_buff *skb)
{
	__u32 zero = 0;
	__u64 *count = bpf_map_lookup_elem(&counters, &zero);
	__u64 *lost = bpf_map_lookup_elem(&events_lost, &zero);
	struct event *event;

	if (!count || !lost)
		return TC_ACT_SHOT;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	*count += 1;
	if (!event) {
		*lost += 1;
		return TC_ACT_OK;
	}
	event->serial = *count;
	event->port = __builtin_bswap16(8080);
	event->pad = 0;
	event->ifindex = skb->ifindex;
	if (*count % 3 == 0)
		bpf_ringbuf_discard(event, 0);
	else
		bpf_ringbuf_submit(event, 0);
	return TC_ACT_OK;
}

#ifdef REFUSED
/* The verifier must refuse it: reads past the packet's end. */
SEC("tc")
int refused(struct __sk_buff *skb)
{
	return *(__u8 *)(unsigned long)skb->data;
}
#endif

char LICENSE[] SEC("license") = "Dual BSD/GPL";
