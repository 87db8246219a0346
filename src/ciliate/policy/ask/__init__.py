"""Questions about policies, answered without a kernel: who may reach whom, why, and what would change.

Everything here asks ``PolicyEngine`` for images and looks answers up in them, as the datapath does; what a rule means
is known to the engine alone. See docs/explanation/explaining-verdicts.md.
"""
