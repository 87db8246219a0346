/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Frames before the kernel makes packets of them: read, changed and sent on with no helper that knows a packet. Only plain
 * ones: no VLAN tag, no options or extension headers, no fragments, TCP without SYN, FIN and RST, UDP.
 */
#pragma once
#include "conntrack.h"
#include "node.h"

/* What one run works with; in a map, since the stack of old verifiers is short of it. */
struct frame {
	union addr saddr, daddr; /* as it came */
	union addr to[2];        /* source and destination that it gets */
	__be16 sport, dport;
	__be16 to_port[2];
	__u8 family;
	__u8 protocol;
	__u16 length; /* octets of the IP packet */
	__u32 pad;
	__u64 now;
	struct translation_key key;
	struct nat_key nat;
	struct wish wish;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct frame);
} frames SEC(".maps");

static __always_inline struct frame *frame_get(void)
{
	__u32 zero = 0;
	struct frame *f = bpf_map_lookup_elem(&frames, &zero);

	if (f) {
		f->key.pad = 0;
		f->nat.pad = 0;
	}
	return f;
}

/* Whether the backend of a row may have one more packet; as still_serves() for what is under way. */
static __always_inline bool serves(const struct translation *row, __u8 protocol)
{
	struct backend *to;

	if (protocol == IPPROTO_TCP)
		return true;
	to = bpf_map_lookup_elem(&backends, &row->backend);
	return to && addr_equal(&to->addr, &row->addr) && to->port == row->port;
}

/* Ports, flags and that the packet ends with the frame or before. */
static __always_inline bool frame_l4(const void *l4, const void *end, struct frame *f, __u32 room)
{
	if (f->protocol == IPPROTO_TCP) {
		const struct tcphdr *tcp = l4;

		if ((const void *)(tcp + 1) > end || tcp->doff < 5 || tcp->doff * 4U > room)
			return false;
		if (((const __u8 *)l4)[13] & (TCP_SYN | TCP_FIN | TCP_RST))
			return false;
		f->sport = tcp->source;
		f->dport = tcp->dest;
		return true;
	}
	if (f->protocol == IPPROTO_UDP) {
		const struct udphdr *udp = l4;

		if ((const void *)(udp + 1) > end || room < sizeof(*udp))
			return false;
		f->sport = udp->source;
		f->dport = udp->dest;
		return f->family == 4 || udp->check; /* IPv6 without a checksum: for tc to judge */
	}
	return false;
}

/* Whether the frame is a plain one; then in `f`. */
static __always_inline bool frame_read(const struct xdp_md *ctx, struct frame *f)
{
	const void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	const struct ethhdr *eth = data;
	__u64 octets = end - data;

	if ((const void *)(eth + 1) > end)
		return false;
	if (eth->h_dest[0] & 1)
		return false;
	octets -= sizeof(*eth);
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		const struct iphdr *ip = data + sizeof(*eth);

		if ((const void *)(ip + 1) > end || *(const __u8 *)ip != 0x45 || ip->frag_off & bpf_htons(0x3fff))
			return false;
		f->length = bpf_ntohs(ip->tot_len);
		if (f->length < sizeof(*ip) || f->length > octets)
			return false;
		f->family = 4;
		f->protocol = ip->protocol;
		addr_set_v4(&f->saddr, ip->saddr);
		addr_set_v4(&f->daddr, ip->daddr);
		return frame_l4(ip + 1, end, f, f->length - sizeof(*ip));
	}
	if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		const struct ipv6hdr *ip = data + sizeof(*eth);
		__u32 length;

		if ((const void *)(ip + 1) > end || ip->version != 6)
			return false;
		length = bpf_ntohs(ip->payload_len) + sizeof(*ip);
		if (length > octets)
			return false;
		f->length = length;
		f->family = 6;
		f->protocol = ip->nexthdr;
		__builtin_memcpy(&f->saddr, &ip->saddr, 16);
		__builtin_memcpy(&f->daddr, &ip->daddr, 16);
		if (addr_is_v4(&f->saddr) || addr_is_v4(&f->daddr))
			return false;
		return frame_l4(ip + 1, end, f, length - sizeof(*ip));
	}
	return false;
}

/* A checksum after what it covers has changed by `diff`, a sum as bpf_csum_diff() makes it (RFC 1624). */
static __always_inline __sum16 csum_moved(__sum16 check, __s64 diff)
{
	__u64 sum = (__u16)~check + (__u64)(__u32)diff;

	return csum_fold((__s64)((sum & 0xffffffff) + (sum >> 32)));
}

/* What the new addresses and ports change in the transport's checksum. */
static __always_inline __s64 frame_diff(const struct frame *f)
{
	__be16 old[2] = { f->sport, f->dport }, new[2] = { f->to_port[0], f->to_port[1] };
	__s64 diff = bpf_csum_diff((__be32 *)old, 4, (__be32 *)new, 4, 0);

	diff = bpf_csum_diff((__be32 *)&f->saddr, 16, (__be32 *)&f->to[0], 16, (__u32)diff);
	return bpf_csum_diff((__be32 *)&f->daddr, 16, (__be32 *)&f->to[1], 16, (__u32)diff);
}

static __always_inline bool frame_write_l4(void *l4, const void *end, const struct frame *f)
{
	__s64 diff = frame_diff(f);

	if (f->protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = l4;

		if ((const void *)(tcp + 1) > end)
			return false;
		tcp->check = csum_moved(tcp->check, diff);
		tcp->source = f->to_port[0];
		tcp->dest = f->to_port[1];
	} else {
		struct udphdr *udp = l4;

		if ((const void *)(udp + 1) > end)
			return false;
		if (udp->check) {
			udp->check = csum_moved(udp->check, diff);
			if (!udp->check)
				udp->check = 0xffff; /* 0 says that there is none (RFC 768) */
		}
		udp->source = f->to_port[0];
		udp->dest = f->to_port[1];
	}
	return true;
}

/* Changes the packet; false: nothing was changed. */
static __always_inline bool frame_write(const struct xdp_md *ctx, const struct frame *f)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;

	if (f->family == 4) {
		struct iphdr *ip = data + sizeof(struct ethhdr);
		__be32 old[2], new[2];

		if ((void *)(ip + 1) > end || !frame_write_l4(ip + 1, end, f))
			return false;
		old[0] = f->saddr.w[3];
		old[1] = f->daddr.w[3];
		new[0] = f->to[0].w[3];
		new[1] = f->to[1].w[3];
		ip->check = csum_moved(ip->check, bpf_csum_diff(old, 8, new, 8, 0));
		ip->saddr = new[0];
		ip->daddr = new[1];
	} else {
		struct ipv6hdr *ip = data + sizeof(struct ethhdr);

		if ((void *)(ip + 1) > end || !frame_write_l4(ip + 1, end, f))
			return false;
		__builtin_memcpy(&ip->saddr, &f->to[0], 16);
		__builtin_memcpy(&ip->daddr, &f->to[1], 16);
	}
	return true;
}

/* Sends the packet to where its new destination is, by the routes of the node; what they do not know is for tc. */
static __always_inline int frame_send(struct xdp_md *ctx, struct frame *f)
{
	struct bpf_fib_lookup fib = {};
	struct ethhdr *eth;
	long result;

	fib.ifindex = ctx->ingress_ifindex;
	fib.tot_len = f->length;
	fib.l4_protocol = f->protocol;
	fib.sport = f->to_port[0];
	fib.dport = f->to_port[1];
	if (f->family == 4) {
		fib.family = AF_INET;
		fib.ipv4_src = f->to[0].w[3];
		fib.ipv4_dst = f->to[1].w[3];
	} else {
		fib.family = AF_INET6;
		__builtin_memcpy(fib.ipv6_src, &f->to[0], 16);
		__builtin_memcpy(fib.ipv6_dst, &f->to[1], 16);
	}
	/* The node is the sender, as the tc programs' redirect has it: it need not be a router. */
	result = bpf_fib_lookup(ctx, &fib, sizeof(fib), BPF_FIB_LOOKUP_OUTPUT);
	if (result != BPF_FIB_LKUP_RET_SUCCESS || fib.ifindex != ctx->ingress_ifindex)
		return XDP_PASS;
	if (!frame_write(ctx, f))
		return XDP_PASS;
	eth = (void *)(long)ctx->data;
	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	__builtin_memcpy(eth->h_dest, fib.dmac, 6);
	__builtin_memcpy(eth->h_source, fib.smac, 6);
	count(0, DIR_EGRESS, f->length);
	return XDP_TX;
}
