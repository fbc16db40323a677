"""A core that pools over the whole image, cut for tiles: passes for its pooled values, then stages for its scores.

See runtime.tiling.pooled for how it is run, and export.passes.open_pooling for how the pooled values become inputs.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import onnx
from fcn_deploy.export.analysis.crossings import crossings
from fcn_deploy.export.analysis.receptive_field import receptive_field
from fcn_deploy.export.analysis.receptive_fields import Field, Fields, WholeImageError
from fcn_deploy.export.build.cut_stages import CUT_WORTH, REFERENCE_BUDGETS, REFERENCE_SIZE, work_of
from fcn_deploy.export.build.working_memory import working_memory
from fcn_deploy.export.graph.edit import clone, extract, initializers
from fcn_deploy.export.passes.open_pooling import NotPooledError, OpenedModel, lowered, open_pooling
from fcn_deploy.export.passes.without_resizing import without_resizing
from fcn_deploy.export.tolerances import REORDERED_SUMS
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.engine_format.pooled import Interpolation, Pass, Pooled, Statistic
from fcn_deploy.runtime.engine_format.stage import Stage
from fcn_deploy.runtime.errors import DeployError, OverBudgetError
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.pixels.prepare import padded_size, prepare
from fcn_deploy.runtime.planning.grid import Grid, Span, grid_of, unit_of
from fcn_deploy.runtime.planning.plan import Plan, plan_passes
from fcn_deploy.runtime.tiling.pooled import PooledTiles, interpolation_inputs
from onnx import ModelProto, helper

FILES = ("pass-0.onnx", "pass-1.onnx")  # members of an engine: the networks of its one or two stages
CUT_CANDIDATES = 10  # feature maps to cut at that are looked at, the smallest
MOST_WORK = 6.0  # times the core's: passes that come to more are not made
LONGEST_STRIP = 8192  # pixels, on which tiles are tried


@dataclass(frozen=True)
class CutPasses:
    """How a network that pools is run in tiles, and its networks.

    Attributes:
        pooled: for the manifest; None: it is not.
        members: of the engine file, name → content.
        reason: why it is not run in tiles; of one that is, what was seen; "": it needs no passes.
    """

    pooled: Pooled | None
    members: dict[str, bytes]
    reason: str


NO_PASSES = CutPasses(None, {}, "")  # of a network that needs none


def cut_passes(core: ModelProto, card: ModelCard) -> CutPasses:
    """A core that pools over the whole image, in passes, tried on strips of an image.

    Args:
        core: `image` → `scores`, float32 or with Q/DQ, which cannot be tiled as it is.
        card: of the model.
    """
    try:
        unresized = without_resizing(core)
        network, resized = core, None
        if unresized is not None:
            network, resized = unresized.model, (unresized.multiple, unresized.least)
        multiple, least = resized or (card.size_multiple, card.smallest)
        opened = open_pooling(network, multiple, least)
        return NO_PASSES if opened is None else _Cutting(core, card, opened, resized).best()
    except (NotPooledError, WholeImageError, DeployError) as error:
        operator_alone = isinstance(error, WholeImageError) and len(str(error).split()) == 2
        reason = f"{error} looks at the whole image, or may" if operator_alone else str(error)
        return CutPasses(None, {}, f"no tiles in passes: {reason}")


@dataclass(frozen=True)
class _Way:
    """One way to cut it."""

    pooled: Pooled
    networks: tuple[ModelProto, ...]
    cost: float


class _Cutting:
    def __init__(self, core: ModelProto, card: ModelCard, opened: OpenedModel, resized: tuple[int, int] | None) -> None:
        self.core, self.whole_card, self.opened, self.resized = core, card, opened, resized
        self.card = card  # of the sizes that the opened network is run at
        if resized is not None:
            self.card = replace(card, size_multiple=resized[0], smallest=resized[1])
        self.scores = opened.model.graph.output[0].name
        self.groups = _groups(opened)
        whole, self.interpolations = lowered(opened.model)
        self.tensors = _tensors(whole, self.interpolations, padded_size(256, 256, self.card)[0])
        image = self.tensors[opened.model.graph.input[0].name]
        self.area = image.shape[2] * image.shape[3]

    def best(self) -> CutPasses:
        """The way of the least work. Raises WholeImageError or NotPooledError: none holds, or pays."""
        whole = self._way("")
        work = sum(stage.cost for chain in whole.pooled.chains for stage in chain)
        times, count = work / sum(stage.cost for stage in whole.pooled.stages), len(self.groups)
        if times > MOST_WORK:
            raise NotPooledError(
                f"{len(self.opened.statistics)} values are pooled over the whole image, one after the other: {count} "
                f"passes in tiles would take {times:.1f} times the work, and {MOST_WORK:g} times is made at most"
            )
        ways = [whole]
        alone = [crossing.maps[0] for crossing in crossings(self.opened.model, Counter()) if len(crossing.maps) == 1]
        places = [name for name in alone if name != self.scores and self._is_map(name)]
        for name in sorted(places, key=lambda name: self.tensors[name].nbytes)[:CUT_CANDIDATES]:
            try:
                ways.append(self._way(name))
            except WholeImageError:
                continue
        best = min(ways, key=lambda way: way.cost)
        if best.cost > CUT_WORTH * whole.cost:
            best = whole
        members = {name: network.SerializeToString() for name, network in zip(FILES, best.networks, strict=False)}
        apart = self._tried(best.pooled, members)
        seen = (
            f"tiles in {count} {'pass' if count == 1 else 'passes'} for what it pools over the whole image, then for "
            f"the scores, equal to the whole image's to rounding ({apart:.0e} of their range)"
        )
        return CutPasses(best.pooled, members, seen)

    def _is_map(self, name: str) -> bool:
        tensor = self.tensors[name]
        return tensor.ndim == 4 and tensor.dtype in (np.float32, np.uint8, np.int8)

    def _way(self, cut: str) -> _Way:
        """Cut at a feature map; "": in one stage. Raises WholeImageError."""
        parts = self._parts(cut)
        maps = {self.opened.maps[group[0].name] for group in self.groups}
        first = {name for node in parts[0].graph.node for name in node.output} if cut else set()
        chains: list[tuple[Stage, ...]] = []
        for result in [self.opened.maps[group[0].name] for group in self.groups] + [self.scores]:
            if not cut or (result in first and result != cut):
                chains.append((self._stage(0, parts[0], result),))
            elif result == cut:
                chains.append((self._stage(0, parts[0], cut),))
            else:
                chains.append((self._stage(0, parts[0], cut), self._stage(1, parts[1], result, cut)))
        passes = tuple(Pass(chain, tuple(group)) for chain, group in zip(chains, self.groups, strict=False))
        networks = []
        for part in parts:
            network, _ = lowered(part)
            made = {name for node in network.graph.node for name in node.output}
            given = {value.name for value in network.graph.output}
            network.graph.output.extend(self._value(name) for name in sorted(maps & made - given))
            networks.append(network)
        pooled = Pooled(passes, chains[-1], self.interpolations, self.resized)
        return _Way(pooled, tuple(networks), self._cost(pooled))

    def _value(self, name: str) -> onnx.ValueInfoProto:
        tensor = self.tensors[name]
        kind = helper.np_dtype_to_tensor_dtype(tensor.dtype)
        return helper.make_tensor_value_info(name, kind, ["N", tensor.shape[1], f"{name}/h", f"{name}/w"])

    def _parts(self, cut: str) -> tuple[ModelProto, ...]:
        """With Stretch nodes; each has all maps that are pooled in it."""
        model = self.opened.model
        maps = list(dict.fromkeys(self.opened.maps.values()))
        if not cut:
            return (_with_outputs(model, [self.scores, *maps]),)
        first = extract(model, [cut])
        made = {name for node in first.graph.node for name in node.output}
        first = _with_outputs(extract(model, [cut, *(name for name in maps if name in made)]), [cut])
        values = [clone(value) for value in model.graph.input[1:]]
        second = extract(
            model, [self.scores, *(name for name in maps if name not in made)], [self._value(cut), *values]
        )
        made = {name for node in first.graph.node for name in node.output} - {cut}
        if made & {name for node in second.graph.node for name in (*node.output, *node.input)}:
            raise WholeImageError("a size of an earlier map is needed after the cut")
        return _with_outputs(first, [cut]), _with_outputs(second, [self.scores])

    def _stage(self, index: int, part: ModelProto, result: str, cut: str = "") -> Stage:
        """The stage that gives a map. Raises WholeImageError where it cannot be tiled."""
        part = extract(part, [result], list(part.graph.input))
        start: Fields = (Field(), Field())
        if cut:
            start = tuple(self._start_of(cut))  # type: ignore[assignment]
        field = receptive_field(part, start)
        down, right = (each.stride for each in field.fields)
        if down.denominator != 1 or right.denominator != 1:
            raise WholeImageError(f"{result} has cells of {down} of a pixel")
        unit = math.lcm(field.period, self.card.size_multiple)
        above, left = (math.ceil(side / unit) * unit for side in field.halo)
        network, _ = lowered(part)
        sides = [self.opened.shapes.cells(result, axis) or (1, 0) for axis in (2, 3)]
        known = all(stride == found for (stride, _), found in zip(sides, (down, right), strict=True))
        return Stage(
            FILES[index],
            part.graph.input[0].name,
            result,
            halo=(above, left),
            period=unit,
            stride=(int(down), int(right)),
            short=(sides[0][1], sides[1][1]) if known else (0, 0),
            bytes_per_pixel=working_memory(network, self.tensors) / self.area,
            output_bytes=self.tensors[result].nbytes / self.area,
            cost=sum(work_of(node, self.tensors) for node in network.graph.node) / self.area,
        )

    def _start_of(self, cut: str) -> list[Field]:
        """The field of the cells of a cut, which stand for the image."""
        fields = receptive_field(extract(self.opened.model, [cut])).fields
        if any(field.stride.denominator != 1 for field in fields):
            raise WholeImageError(f"{cut} has cells of a part of a pixel")
        return [Field(each.stride, Fraction(0), each.stride - 1, int(each.stride)) for each in fields]

    def _cost(self, pooled: Pooled) -> float:
        """Mean work of the reference images; one that cannot be had counts as ten times each pass."""
        costs = []
        for budget in REFERENCE_BUDGETS:
            try:
                costs.append(plan_passes(REFERENCE_SIZE, self.whole_card, pooled, int(budget)).overhead)
            except OverBudgetError:
                costs.append(10.0 * len(pooled.chains))
        return float(np.mean(costs))

    def _tried(self, pooled: Pooled, members: dict[str, bytes]) -> float:
        """How far the scores of tiles are from the whole image's, on strips, as a share of their range.

        Raises WholeImageError where that is more than rounding.
        """
        run, worst = session(self.core.SerializeToString()), 0.0
        tiles = PooledTiles(pooled, self.whole_card, members.__getitem__, None)
        for size in self._strips(pooled):
            image = natural_noise(*size, self.whole_card, seed=0)
            padded = padded_size(*size, self.whole_card)
            seen = pooled.padded(size, padded)
            chains = [tuple(_small_tiles(stage, seen, self.card) for stage in chain) for chain in pooled.chains]
            plan = Plan(size, padded, 0, grids=chains[-1], passes=tuple(chains[:-1]))
            ours = np.concatenate([band for *_, band in tiles.bands(image, plan)], axis=1)
            theirs = run.run([self.scores], {run.get_inputs()[0].name: prepare(image, self.whole_card)})[0][0]
            if ours.shape != theirs.shape:
                raise WholeImageError("its tiles were tried, and are of another size than the whole image's scores")
            apart = float(np.abs(ours - theirs).max()) / max(float(np.ptp(theirs)), 1e-12)
            # Not "difference > tolerance": a NaN must fail.
            if not apart <= REORDERED_SUMS:
                raise WholeImageError("its tiles were tried, and differ from the whole image")
            worst = max(worst, apart)
        return worst

    def _strips(self, pooled: Pooled) -> list[tuple[int, int]]:
        """Sizes of images so long that no tile sees all of it; some end within a period."""
        stages = [stage for chain in pooled.chains for stage in chain]
        unit = math.lcm(*(unit_of(stage, self.card) for stage in stages))
        down = any(any(stage.short) for stage in stages)
        least = -(-self.card.smallest // unit) * unit
        sizes = []
        for axis in (0, 1):
            halo = max((stage.halo or (0, 0))[axis] for stage in stages)
            length = min(max(3 * halo, 4 * unit, least + 2 * unit), LONGEST_STRIP) + 2 * unit
            # The last tile may have a single pixel, and no cell of what is rounded down.
            within = unit - 1 if down else unit // 2 + 1
            for end in {0, within if self.whole_card.size_multiple == 1 else 0}:
                size = (length - end, max(2 * unit, least) - end)
                sizes.append(size if axis == 0 else size[::-1])
        return sizes


def _small_tiles(stage: Stage, padded: tuple[int, int], card: ModelCard) -> Grid:
    """Tiles of a stage that are as long as its halo."""
    unit = unit_of(stage, card)
    tile = tuple(max(unit, -(-side // unit) * unit) for side in stage.halo or (0, 0))
    return grid_of(padded, (tile[0], tile[1]), stage, card)


def _groups(opened: OpenedModel) -> list[list[Statistic]]:
    """The statistics that one pass gives, in an order in which none needs a later one: those of one map."""
    order: dict[str, list[Statistic]] = {}
    for each in opened.statistics:
        order.setdefault(opened.maps[each.name], []).append(each)
    return list(order.values())


def _with_outputs(model: ModelProto, first: Sequence[str]) -> ModelProto:
    """A model whose outputs are these, then its others."""
    model = clone(model)
    names = [*first, *(value.name for value in model.graph.output if value.name not in first)]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return model


def _tensors(network: ModelProto, interpolations: tuple[Interpolation, ...], side: int) -> dict[str, np.ndarray]:
    """Every tensor of a lowered network, for an image of side×side zeros."""
    model = clone(network)
    del model.graph.output[:]
    names = [name for node in network.graph.node for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    run = session(model.SerializeToString(), optimise=False)
    span = Span(0, side, 0, side)
    feeds = interpolation_inputs(interpolations, (span, span), (side, side))
    image, *others = run.get_inputs()
    feeds = {given.name: feeds.get(given.name, np.zeros([1 if type(d) is str else d for d in given.shape], np.float32))
             for given in others}  # fmt: skip
    feeds[image.name] = np.zeros((1, image.shape[1], side, side), np.float32)
    results = run.run(names, feeds)
    return {**initializers(network), **feeds, **dict(zip(names, map(np.asarray, results), strict=True))}
