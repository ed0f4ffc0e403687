"""In which order weights are read, which of them read the same, and that parts of a model run as they do in the whole."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.calibration import Batch
from torch_to_nnef.quantize.sequence import Replay, order_of
from torch_to_nnef.quantize.targets import find_targets


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        return x + self.o(torch.tanh(self.q(x)) * self.k(x))


class Net(nn.Module):
    """`way` is how the outputs of its blocks are used."""

    def __init__(self, way="chain"):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.embedding = nn.Embedding(16, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.between = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 16, bias=False)
        self.never = nn.Linear(32, 32)
        if way == "tied":
            self.head.weight = self.embedding.weight
        if way == "shared":
            self.blocks[2].q.weight = self.blocks[0].q.weight

    def forward(self, ids):
        x = self.embedding(ids)
        seen = []
        for block, between in zip(self.blocks, self.between, strict=True):
            if self.way == "parallel":
                seen.append(block(self.embedding(ids)))
                continue
            x = block(x)
            if self.way == "skips" and block is self.blocks[0]:
                x = x + seen[0] if seen else x
            seen.append(x)
            if self.way == "between":
                x = torch.relu(between(x))
        if self.way == "skips":
            x = x + seen[0]
        return self.head(sum(seen) if self.way == "parallel" else x)


def batches(count=2):
    generator = torch.Generator().manual_seed(0)
    return [Batch((torch.randint(16, (2, 3), generator=generator),), {}) for _ in range(count)]


def order(model, given=None):
    with torch.no_grad():
        return order_of(model, find_targets(model, None), given or batches())


def told(order):
    return [([t.places[0].fqn.removesuffix(".weight") for t in s.targets], s.calls, s.block) for s in order.stages]


def test_stages_are_in_order_and_share_inputs():
    found = order(Net())
    assert len(found.blocks) == 3
    blocks = [
        stage for i in range(3) for stage in (([f"blocks.{i}.q", f"blocks.{i}.k"], 1, i), ([f"blocks.{i}.o"], 1, i))
    ]
    assert told(found) == [(["embedding"], 1, -1), *blocks, (["head"], 1, 3)]
    assert [t.places[0].fqn for t in found.unused] == [*(f"between.{i}.weight" for i in range(3)), "never.weight"]


def test_a_tied_weight_is_read_for_the_last_time_at_the_end():
    found = order(Net("tied"))
    assert told(found)[-1] == (["embedding"], 2, 3)
    assert len(found.blocks) == 3


def test_weights_between_blocks_come_before_the_next():
    found = order(Net("between"))
    assert len(found.blocks) == 3
    assert (["between.0"], 1, 1) in told(found)
    assert (["between.2"], 1, 3) in told(found)


@pytest.mark.parametrize("way", ["parallel", "skips", "shared"])
def test_blocks_that_are_no_chain_are_one(way):
    model = Net(way)
    found = order(model)
    assert found.blocks == (model,)
    assert {stage.block for stage in found.stages} == {0}


def test_blocks_that_share_a_state_are_one():
    class Remembers(Block):
        def forward(self, x, state):
            state.append(x)
            return super().forward(x) + (state[0] if len(state) == 3 else 0)

    class Sharing(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Remembers() for _ in range(3))

        def forward(self, x):
            state = []
            for block in self.blocks:
                x = block(x, state)
            return x

    model = Sharing()
    assert order(model, [Batch((torch.randn(2, 32),), {})]).blocks == (model,)


class Routed(nn.Module):
    """A number in front says which expert is asked."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 32)

    def forward(self, which, x):
        return self.out(self.experts[which](x))


def test_weights_that_only_later_batches_use_are_found():
    given = [Batch((which, torch.randn(2, 32)), {}) for which in (1, 1, 0)]
    found = order(Routed(), given)
    assert sorted(told(found)) == [(["experts.0"], 0, 0), (["experts.1"], 1, 0), (["out"], 1, 0)]
    assert [t.places[0].fqn for t in found.unused] == ["experts.2.weight"]


def test_without_a_list_the_model_is_the_block():
    model = nn.Linear(32, 32)
    found = order(model, [Batch((torch.randn(1, 32),), {})])
    assert (found.blocks, told(found)) == ((model,), [(["weight"], 1, 0)])


@contextmanager
def nothing(enough):
    yield


def test_a_replay_gives_what_the_model_gives_and_runs_each_block_once():
    model, given = Net(), batches()
    ran = []
    for index, block in enumerate(model.blocks):
        block.o.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        expected = [batch(model) for batch in given]
        ran.clear()
        replay = Replay(model, model.blocks, given)
        for _ in model.blocks:
            replay.advance()
        assert ran == [0, 0, 1, 1, 2, 2]
        outputs = [replay.run(index, nothing) for index in range(2)]
    assert len(ran) == 6
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_a_run_ends_when_it_was_enough_or_behind_the_last_block():
    model, given = Net(), batches()
    ran = []
    model.blocks[1].o.register_forward_hook(lambda *_: ran.append("o"))
    model.blocks[2].register_forward_hook(lambda *_: ran.append("next"))
    replay = Replay(model, model.blocks, given)

    @contextmanager
    def until_k(enough):
        handle = model.blocks[1].k.register_forward_hook(lambda *_: enough())
        yield
        handle.remove()

    with torch.no_grad():
        replay.advance()
        assert replay.run(0, until_k) is None
        assert not ran
        assert replay.run(0, nothing, 1) is None
        assert ran == ["o"]
        assert torch.equal(replay.run(0, nothing), given[0](model))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_after_an_error_in_the_middle_no_hook_and_no_forward_is_left(error):
    model, given = Net(), batches()
    replay = Replay(model, model.blocks, given)

    def fail(*_):
        raise error

    with torch.no_grad():
        replay.advance()
        handle = model.blocks[1].k.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else T2NErrorInvalidArgument):
            replay.advance()
        handle.remove()
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())
    assert replay.at == 1


def test_a_forward_of_ones_own_is_put_back():
    model = Net()
    model.blocks[0].forward = forward = lambda x: x + 1
    replay = Replay(model, model.blocks, batches())
    with torch.no_grad():
        replay.advance()
        replay.advance()
    assert vars(model.blocks[0])["forward"] is forward


def test_a_batch_that_leaves_a_block_out_is_told():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

        def forward(self, x):
            for block in self.blocks[: len(x)]:
                x = block(x)
            return x

    model = Skips()
    replay = Replay(model, model.blocks, [Batch((torch.randn(2, 32),), {}), Batch((torch.randn(1, 32),), {})])
    with torch.no_grad():
        replay.advance()
        with pytest.raises(T2NErrorInvalidArgument, match="batch 1 does not run the block Linear 1"):
            replay.advance()
