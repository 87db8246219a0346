"""L7 policy through Envoy: a daemon of its own that outlives the agent, and the client the agent talks to it with.

``api``, ``client`` and ``binary`` are light and may be imported by anybody; everything else belongs to the daemon
``ciliate-proxyd``. See docs/explanation/proxy.md and docs/adr/0007-proxy-is-a-process-of-its-own.md.
"""
