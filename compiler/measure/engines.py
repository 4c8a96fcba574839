"""quern and the engines that --against names, opened for one model, each in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from compiler.checkpoint import open_checkpoint
from compiler.errors import UserError
from compiler.measure import peers, shapes, speed
from compiler.measure.growth import Setup
from compiler.measure.peers import Peer, PeerModel, Say, Side
from runtime.bundle import read_manifest


@dataclass(frozen=True)
class Engines:
    """Who is measured beside quern: what --against said -> the peer and its variant. folder: where peers are.

    checkpoint: what the bundle was built from; None: a shape with random weights.
    """

    others: dict[str, tuple[Peer, str]]
    folder: Path
    checkpoint: Path | None = None

    @classmethod
    def installed(cls, named: Sequence[str], folder: Path, checkpoint: Path | None, install: bool, say: Say) -> Engines:
        """All of those, installed if that was asked for. Raises UserError, for the checkpoint before anything else."""
        if checkpoint is not None:
            open_checkpoint(checkpoint)
        found = {text: peers.find(text) for text in named}
        for peer, variant in found.values():
            peers.require(peer, folder, variant, install, say)
        return cls(found, folder, checkpoint)

    def opened(
        self, stack: ExitStack, bundle: Path, setup: Setup, threads: int | None,
        left_out: dict[str, UserError] | None = None,
    ) -> list[Side]:  # fmt: skip
        """quern first, with the bundle; the others in its number of threads. All are gone when the stack ends.

        left_out: engines that cannot run this model, to which others are added; None: the first that cannot raises.
        """
        quern = stack.enter_context(speed.open_side(bundle, threads))
        sides: list[Side] = [quern]
        for text, (peer, variant) in self.others.items():
            if left_out is not None and text in left_out:
                continue
            try:
                model = self._model(bundle, setup)
                sides.append(stack.enter_context(peer.opened(self.folder, variant, model, quern.threads)))
            except UserError as error:
                if left_out is None:
                    raise
                left_out[text] = error
        return sides

    def _model(self, bundle: Path, setup: Setup) -> PeerModel:
        if self.checkpoint is None:
            config = shapes.settings(setup.shape, setup.positions)
            return PeerModel(config, setup.bits, setup.group_size, setup.head_bits)
        made = read_manifest(bundle).quantization
        if made["group_size"] is None:
            raise UserError(
                f"{bundle}: its linear layers are not quantised, and other engines are compared with quantised ones. "
                f"Build it with --bits 4 or --bits 8."
            )
        bits, group, head = (int(str(made[name])) for name in ("bits", "group_size", "head_bits"))
        return PeerModel(open_checkpoint(self.checkpoint).config.data, bits, group, head, self.checkpoint)
