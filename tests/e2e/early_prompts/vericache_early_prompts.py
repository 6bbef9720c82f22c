"""An SGLang plugin under which prompts of a tiny model come from the host before their prefill, as
those of a large one do, nobody rotates because it pays, and every copy takes a while."""

from __future__ import annotations

import os
import time

COPY_S = 0.05
# Of 20 GB/s: some twenty tokens.
LEAST_S = 4e-6


def activate() -> None:
    """Loaded in every process; only a scheduler that uses our flag runs a loader."""
    if not os.environ.get("_SGLANG_VERICACHE_ARMED"):
        return
    from sglang_vericache.loader.copy import PlainCopier
    from sglang_vericache.rounds import rotation_setup
    from sglang_vericache.rounds.admission import Admission
    from sglang_vericache.rounds.step_watch import StepWatch

    submit = PlainCopier.submit

    def slow_submit(copier, jobs) -> None:
        time.sleep(COPY_S)
        submit(copier, jobs)

    PlainCopier.submit = slow_submit
    rotation_setup.LEAST_S = LEAST_S
    StepWatch.rotation_loses = property(lambda watch: True)
    # On a CPU a prefill takes longer than any copy.
    Admission.prefill_s = property(lambda admission: 0.0)
