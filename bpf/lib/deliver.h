/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Where a packet goes: resolving its ends, and the ways to send it on. */
#pragma once
#include <linux/if_packet.h>
#include "event.h"
#include "frag.h"
#include "mtu.h"
#include "nat.h"
#include "policy.h"
#include "proxy.h"
#include "track.h"
#include "translate.h"

static __always_inline __u32 world_identity(const struct pkt *p)
{
	if (config_ipv4 && config_ipv6)
		return p->family == 4 ? IDENTITY_WORLD_V4 : IDENTITY_WORLD_V6;
	return IDENTITY_WORLD;
}

static __always_inline void end_of_endpoint(struct end *end, const struct endpoint *ep)
{
	end->identity = ep->identity;
	end->id = ep->id;
	end->policy[DIR_EGRESS] = ep->policy[DIR_EGRESS];
	end->policy[DIR_INGRESS] = ep->policy[DIR_INGRESS];
	end->options = ep->options;
	end->known = 1;
	end->since = ep->since;
}

static __always_inline void end_remote(struct end *end, __u32 identity, bool known)
{
	end->identity = identity;
	end->id = 0;
	end->options = 0;
	end->known = known;
	end->since = 0;
}

/* The node's row while a node policy is in force, else NULL. */
static __always_inline struct endpoint *policed_node(void)
{
	__u32 key = config_host_ifindex;
	struct endpoint *node = bpf_map_lookup_elem(&endpoints, &key);

	return node && (node->policy[DIR_EGRESS] | node->policy[DIR_INGRESS]) ? node : NULL;
}

/* An end of this node itself: an endpoint with policies of its own only while there is one. */
static __always_inline void end_of_node(struct end *end)
{
	struct endpoint *node = policed_node();

	if (node)
		end_of_endpoint(end, node);
	else
		end_remote(end, IDENTITY_HOST, true);
}

static __always_inline struct ipcache_entry *ipcache_find(const union addr *addr)
{
	struct ipcache_key key = { .prefixlen = 128, .addr = *addr };

	return bpf_map_lookup_elem(&ipcache, &key);
}

/* Fills s->ends[i] for an address; for the destination (i = 1) also where to send. 0 or a negated drop reason. */
static __noinline int resolve(struct scratch *s, int i)
{
	union addr addr;
	struct local_addr *local;
	struct ipcache_entry *entry;
	struct end *end;

	if (!s)
		return -DROP_INTERNAL;
	end = i ? &s->ends[1] : &s->ends[0];
	addr = i ? s->p.daddr : s->p.saddr;
	local = bpf_map_lookup_elem(&local_addrs, &addr);
	if (local && local->flags & LOCAL_HOST) {
		end_of_node(end);
		if (i)
			s->kind = DEST_HOST;
		return 0;
	}
	if (local) {
		struct endpoint *ep = bpf_map_lookup_elem(&endpoints, &local->ifindex);

		if (!ep)
			return -DROP_NO_ENDPOINT;
		end_of_endpoint(end, ep);
		if (i) {
			s->kind = DEST_POD;
			s->dest_ifindex = ep->ifindex;
			__builtin_memcpy(s->macs, ep->mac, 6);
			__builtin_memcpy(s->macs + 6, ep->gw_mac, 6);
		}
		return 0;
	}
	entry = ipcache_find(&addr);
	if (!entry) {
		end_remote(end, world_identity(&s->p), false);
		if (i) {
			s->kind = DEST_NATIVE;
			s->dest_node = 0;
		}
		return 0;
	}
	end_remote(end, entry->identity, entry->flags & (IPCACHE_POD | IPCACHE_NODE));
	if (i) {
		s->tunnel = entry->tunnel;
		s->dest_node = !!(entry->flags & IPCACHE_NODE);
		s->kind = DEST_NATIVE;
		if (entry->flags & IPCACHE_POD && config_tunnel) {
			if (addr_zero(&s->tunnel))
				return -DROP_NO_TUNNEL_ENDPOINT;
			s->kind = DEST_TUNNEL;
		} else if (entry->flags & IPCACHE_POD) {
			s->dest_node = 2; /* native routing: a pod keeps its address */
		}
	}
	return 0;
}

static __always_inline __u64 epoch_now(void)
{
	__u32 zero = 0;
	__u64 *now = bpf_map_lookup_elem(&epoch, &zero);

	return now ? *(volatile __u64 *)now : 0;
}

/* Starts a run: reads the epoch before anything that depends on it. */
static __always_inline struct scratch *start(struct __sk_buff *skb, __u8 observation)
{
	struct scratch *s = scratch_get();

	if (!s)
		return NULL;
	s->epoch = epoch_now();
	s->now = expiry_clock();
	s->ifindex = skb->ifindex;
	s->observation = observation;
	s->direction = observation == OBS_FROM_POD || observation == OBS_TO_NETDEV ? DIR_EGRESS : DIR_INGRESS;
	s->ct_state = CT_STATE_NEW;
	s->in_tunnel = 0;
	s->answers = 0;
	s->flags = 0;
	s->service = 0;
	s->made = 0;
	s->dsr = 0;
	s->client_netns = 0;
	s->l7 = 0;
	s->rule[DIR_EGRESS] = s->rule[DIR_INGRESS] = 0;
	/* What a drop before or in the parser reports: not the packet that was here before. */
	__builtin_memset(&s->p, 0, offsetof(struct pkt, l3));
	s->p.length = skb->len;
	return s;
}

/* The last step of every way into a pod; `macs`: Ethernet destination and source. From an ingress hook the packet jumps
 * into the pod's namespace in this pass. Negative: a drop reason.
 */
static __always_inline int into_pod(struct __sk_buff *skb, const __u8 *macs, __u32 ifindex, __u32 octets, bool ingress)
{
	if (bpf_skb_store_bytes(skb, 0, macs, 2 * ETH_ALEN, 0))
		return -DROP_WRITE_ERROR;
	count(0, DIR_INGRESS, octets);
	skb->mark = 0;
	return ingress ? bpf_redirect_peer(ifindex, 0) : bpf_redirect(ifindex, 0);
}

/* Whether the packet goes to a client that asked a frontend, so that it must come from there. */
static __always_inline bool answers_service(const struct scratch *s)
{
	return s->flags & CT_SERVICE && s->answers;
}

static __always_inline int deliver_local(struct __sk_buff *skb, struct scratch *s)
{
	int result = answers_service(s) ? service_back(skb, s) : 1;

	if (!result) /* evicted: the client would reset what it does not know, its next packet makes the row anew */
		result = -DROP_NAT_NO_MAPPING;
	if (result > 0)
		result = into_pod(skb, s->macs, s->dest_ifindex, s->p.length, s->observation != OBS_FROM_HOST);
	return result < 0 ? drop(s, result) : result;
}

/* Over the overlay; the source's identity travels as the VNI. */
static __always_inline int encapsulate(struct __sk_buff *skb, struct scratch *s)
{
	struct bpf_tunnel_key key = {};
	__u64 flags = 0;

	key.tunnel_id = s->ends[0].identity == IDENTITY_HOST ? IDENTITY_REMOTE_NODE : s->ends[0].identity;
	key.tunnel_ttl = 64;
	if (addr_is_v4(&s->tunnel)) {
		key.remote_ipv4 = bpf_ntohl(s->tunnel.w[3]);
		flags = BPF_F_ZERO_CSUM_TX;
	} else {
		__builtin_memcpy(key.remote_ipv6, &s->tunnel, 16);
		flags = BPF_F_TUNINFO_IPV6;
	}
	if (bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags))
		return drop(s, -DROP_TUNNEL_KEY);
	count(0, DIR_EGRESS, s->p.length);
	skb->mark = MARK_JUDGED;
	return bpf_redirect(config_tunnel_ifindex, 0);
}

/* Out of the underlay device; the neighbour is the stack's business. A reply keeps the address that was asked. */
static __always_inline int send_native(struct __sk_buff *skb, struct scratch *s)
{
	if (config_masquerade && s->dest_node != 2 && !s->answers) {
		int error = nat_out(skb, s);

		if (error)
			return drop(s, error);
	}
	count(0, DIR_EGRESS, s->p.length);
	skb->mark = MARK_JUDGED;
	return bpf_redirect_neigh(config_native_ifindex, NULL, 0, 0);
}

/* A reply to what came by the overlay goes back that way, to a node's address too, or nowhere; but to a client whom another
 * node passed on it goes straight. 0 or a drop reason.
 */
static __always_inline int route_replies(struct scratch *s)
{
	if (s->kind != DEST_NATIVE || (s->flags & (CT_TUNNEL | CT_DSR)) != CT_TUNNEL || s->ct_state == CT_STATE_NEW)
		return 0;
	if (s->dest_node != 1) /* a pod whose node the ipcache does not know (yet, or any more) */
		return -DROP_NO_TUNNEL_ENDPOINT;
	if (addr_zero(&s->tunnel))
		s->tunnel = s->p.daddr;
	s->kind = DEST_TUNNEL;
	return 0;
}

/* Addresses that no router forwards to or from: multicast, reserved, loopback, unspecified, IPv6 link-local. */
static __always_inline bool stays_on_link(const union addr *addr)
{
	__u8 first = addr->b[12];

	if (addr_is_v4(addr))
		return first >= 224 || first == 127 || !first;
	return addr->b[0] == 0xff || (addr->b[0] == 0xfe && (addr->b[1] & 0xc0) == 0x80) ||
	       (!addr->d[0] && !addr->w[2] && (addr->w[3] == bpf_htonl(1) || !addr->w[3]));
}
