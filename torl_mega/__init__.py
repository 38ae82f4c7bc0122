"""torl_mega: tool-integrated reinforcement learning with Megatron-Core and SGLang (ToRL, arXiv 2503.23383)."""

__version__ = "0.1.0"
