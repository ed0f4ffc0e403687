"""What each weight of a checkpoint costs alone: `t2n sensitivity`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch_to_nnef.api import sensitivity
from torch_to_nnef.compress import dynamic_load_registry
from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.graph.uses import weight_uses
from torch_to_nnef.llm_tract.calibration import calibration_of, check_calibration, judged_on
from torch_to_nnef.llm_tract.checkpoint import Checkpoint
from torch_to_nnef.llm_tract.export import Work
from torch_to_nnef.llm_tract.families import step_signature
from torch_to_nnef.quantize.calibration import Calibration
from torch_to_nnef.report.progress import progress_bars
from torch_to_nnef.report.words import size

if TYPE_CHECKING:
    from rich.table import Table

    from torch_to_nnef.llm_tract.options import LlmOptions
    from torch_to_nnef.quantize.costs import TensorCost


@dataclass(frozen=True)
class LlmSensitivity:
    """costs: KL(float || with this weight by `method`), mean in nats of the next token over `tokens`; the worst first."""

    model: str
    method: str
    tokens: int
    costs: tuple[TensorCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {"model": self.model, "method": self.method, "tokens": self.tokens, "costs": [*map(asdict, self.costs)]}

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        table = Table(title=f"{self.model}: each weight in {self.method} alone, on {self.tokens} tokens")
        table.add_column("weight", overflow="fold")
        for title in ("KL to float", "f16 adds", "KL per MiB", "weight SNR"):
            table.add_column(title, justify="right")
        for cost in self.costs:
            cells = f"{cost.cost:.2e}", size(cost.added), f"{cost.worth * (1 << 20):.1e}", f"{cost.snr_db:.1f} dB"
            table.add_row(cost.fqn, *cells)
        return table


def llm_sensitivity(options: LlmOptions) -> LlmSensitivity:
    """What each weight costs alone that `options.compression_method` packs; nothing is written.

    Raises what `export_llm` raises before it writes, and what `sensitivity` does.
    """
    method, registry = options.compression_method or "", dynamic_load_registry(options.compression_registry)
    if method not in registry:
        raise T2NErrorInvalidArgument(f"no compression method {method!r}; there are {', '.join(registry)}")
    check_calibration(options, [registry[method]], judges=True)
    checkpoint = Checkpoint.find(options)
    signature = step_signature(checkpoint.config, 1, trust_remote_code=options.trust_remote_code)
    work = Work(options, checkpoint, signature)
    work.load()
    _, graph = work.capture()
    calibration = calibration_of(options, work.model, work.tokenizer, signature.context)
    judge = judged_on(calibration, work.tokenizer, signature.context)
    data = Calibration(calibration.learn if calibration else judge, judge)
    with progress_bars() as bars:
        _, costs = sensitivity(
            work.model, data, method, registry, tokenizer=work.tokenizer, include=options.include or None,
            exclude=options.exclude or None, uses=weight_uses(graph), measure="kl", progress=bars("measure"),
        )  # fmt: skip
    tokens = sum(batch.kwargs["input_ids"].numel() for batch in judge)
    return LlmSensitivity(checkpoint.name, method, tokens, tuple(costs))
