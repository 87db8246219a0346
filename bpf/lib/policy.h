/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The policy look-up of docs/adr/0003-policy-in-classes.md: at most three map look-ups. */
#pragma once
#include "packet.h"

#define IDENTITY_HOST 1
#define IDENTITY_WORLD 2
#define IDENTITY_REMOTE_NODE 6
#define IDENTITY_WORLD_V4 9
#define IDENTITY_WORLD_V6 10
#define IDENTITY_ALLOCATED_MIN 256

struct decision {
	int error; /* 0: allowed; else the negated drop reason */
	__u32 l7;  /* rule set to redirect to, 0: none */
	__u32 rule;
};

static __always_inline __u32 scope_of(__u32 identity)
{
	__u32 scope;

	if (identity < IDENTITY_ALLOCATED_MIN)
		scope = identity == IDENTITY_WORLD || identity == IDENTITY_WORLD_V4 || identity == IDENTITY_WORLD_V6 ?
				SCOPE_WORLD :
				SCOPE_RESERVED;
	else if (identity >> 24 == 0)
		scope = identity >> 16 == config_cluster_id ? SCOPE_CLUSTER : SCOPE_MESH;
	else
		scope = identity >> 24 == 1 ? SCOPE_WORLD : SCOPE_NODE;
	return scope;
}

static __always_inline struct row *row_of(__u32 class, __u8 protocol, __be16 port)
{
	struct row_key key = { .prefixlen = 64, .class = class, .protocol = protocol, .port = port };

	return class ? bpf_map_lookup_elem(&policy_rows, &key) : NULL;
}

/* Decides one direction of one endpoint. `port`: the connection's destination port, or the ICMP type. */
static __noinline int policy_decide(__u32 id, __u32 identity, __u8 protocol, __be16 port, struct decision *out)
{
	struct class_key class_key = { .policy = id, .identity = identity };
	struct row *row = NULL;
	struct policy *policy;
	__u32 scope, fallback, *class;

	out->error = 0;
	out->l7 = 0;
	out->rule = 0;
	if (!id)
		return 0;
	policy = bpf_map_lookup_elem(&policies, &id);
	if (!policy) {
		out->error = -DROP_NO_POLICY;
		return 0;
	}
	scope = scope_of(identity);
	if (scope >= SCOPE_MAX)
		scope = SCOPE_RESERVED;
	fallback = policy->classes[scope];
	class = bpf_map_lookup_elem(&policy_classes, &class_key);
	if (class)
		row = row_of(*class, protocol, port);
	else if (identity >= IDENTITY_ALLOCATED_MIN && !bpf_map_lookup_elem(&identities, &identity))
		fallback = policy->unknown[scope];
	if (!row)
		row = row_of(fallback, protocol, port);
	if (!row) {
		out->rule = policy->default_rule;
		out->error = -DROP_POLICY_DENIED;
		return 0;
	}
	out->rule = row->rule;
	if (row->verdict == ROW_ALLOW)
		return 0;
	if (row->verdict == ROW_REDIRECT && protocol == IPPROTO_TCP) {
		out->l7 = row->l7;
		return 0;
	}
	out->error = row->rule == policy->default_rule ? -DROP_POLICY_DENIED : -DROP_POLICY_DENY;
	return 0;
}
