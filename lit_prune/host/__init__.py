"""The only code that knows transformers: attention wrapper, decoder hooks, where things are."""

from lit_prune.host.decoder import DecoderHost, host_of
from lit_prune.host.idle import Prefix
from lit_prune.host.session import Record, Session, StageRecord

__all__ = ["DecoderHost", "Prefix", "Record", "Session", "StageRecord", "host_of"]
