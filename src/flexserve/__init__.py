"""FlexServe: an LLM server whose secrets stay secret and whose memory still belongs to the OS."""

__version__ = "0.1.0"
