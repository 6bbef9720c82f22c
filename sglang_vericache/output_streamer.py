"""SGLang's output streamer without empty chunks (patches/0005) and with per-request counters."""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.managers import io_struct
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_vericache.metrics import RowBytes, counters_of

RESPONSE_FIELD = "vericache"
# Marks one value for the request (patches/0006). Without it, values are lists that SGLang
# concatenates, and hooks/response_fields.py takes the last.
_RequestLevelInfo = getattr(io_struct, "RequestLevelInfo", None)


class VeriCacheOutputStreamer(SchedulerOutputStreamer):
    """Adds the field RESPONSE_FIELD to the ``meta_info`` of finished requests.

    Attributes:
        row_bytes: of the pools; a subclass for one server sets it.
    """

    __slots__ = ()

    has_additional_customized_info: ClassVar[bool] = True
    row_bytes: ClassVar[RowBytes]

    def _stream_output_generation(
        self,
        reqs: list[Req],
        return_logprob: bool,
        skip_req: Req | None = None,
        is_idle_batch: bool = False,
    ):
        news = [r for r in reqs if r.finished() or len(r.output_ids) > r.send_token_offset]
        for req in news:
            if req.finished():
                _count_rounds_only(req)
        return super()._stream_output_generation(news, return_logprob, skip_req, is_idle_batch)

    def build_additional_customized_info(self, reqs: list[Req]) -> dict[str, list]:
        if not any(req.finished() for req in reqs):
            return {}  # a list of nothing for each would go through three processes
        return {RESPONSE_FIELD: [self._response_value(req) for req in reqs]}

    def _response_value(self, req: Req) -> Any:
        record = counters_of(req).describe(self.row_bytes) if req.finished() else None
        if _RequestLevelInfo is None:
            return [record] if record is not None else []
        return _RequestLevelInfo(record) if record is not None else None

    def is_request_level_customized_info_key(self, key: str) -> bool:
        return key == RESPONSE_FIELD


def streamer_class(worker: Any) -> type[VeriCacheOutputStreamer]:
    """The streamer of the server that ``worker`` drafts for."""

    class OutputStreamer(VeriCacheOutputStreamer):
        __slots__ = ()
        row_bytes = worker.row_bytes

    return OutputStreamer


def _count_rounds_only(req: Req) -> None:
    """SGLang counts every step as a verify pass, and shows its counts when a request ends."""
    counters = counters_of(req)
    req.spec_verify_ct = counters.rounds
    req.spec_num_correct_drafts = counters.accepted
    req.spec_correct_drafts_histogram = counters.accepted_histogram()
