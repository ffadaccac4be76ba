"""A teacher: its loss, what it is made from, and the loops in which it works."""

import copy
import gc
import io
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bisparse import finalize_, prune_, sparsify_, verify
from bisparse.distances import logit_divergence
from bisparse.training import Distillation, FixedDecay


class Blocks(nn.Module):
    """Blocks, with dropout, and a head; input (B, 16), 8 classes."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(dropout)) for _ in range(3))
        self.head = nn.Linear(16, 8)

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return self.head(inputs)


@pytest.fixture
def net() -> Blocks:
    torch.manual_seed(3)
    return Blocks()


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, 16, generator=generator), torch.randint(0, 8, (8,), generator=generator)


def test_a_student_that_works_on_its_inputs_in_place_is_refused():
    class Normalising(nn.Sequential):
        def forward(self, x: torch.Tensor, *, mean: torch.Tensor) -> torch.Tensor:
            return super().forward(x.sub_(mean))

    student = Normalising(nn.Linear(16, 8))
    teacher, mean = Distillation(student, task=0.0), torch.tensor(2.0)
    student(torch.randn(4, 16), mean=mean)
    with pytest.raises(ValueError, match="in place"):
        teacher.loss()
    with torch.no_grad():
        student.eval()(torch.randn(4, 16), mean=mean)
    student.train()
    student.forward = lambda x, *, mean: nn.Sequential.forward(student, x - mean)
    student(torch.randn(4, 16), mean=mean)
    assert float(teacher.loss().detach()) == pytest.approx(0.0, abs=1e-6)


class Residual(nn.Module):
    """Blocks that add to their input, in place or not; then a ReLU, in place or not."""

    def __init__(self, blocks: bool, relu: bool) -> None:
        super().__init__()
        self.blocks, self.in_place = nn.ModuleList(nn.Linear(16, 16) for _ in range(2)), blocks
        self.relu, self.head = nn.ReLU(inplace=relu), nn.Linear(16, 8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.blocks[0](inputs)
        change = self.blocks[1](hidden.clone())
        hidden = hidden.add_(change) if self.in_place else hidden + change
        return self.head(self.relu(hidden))


@pytest.mark.parametrize(("blocks", "relu"), [(True, False), (False, True), (False, False)])
def test_a_hidden_state_that_is_changed_in_place_is_refused(blocks, relu):
    student = Residual(blocks, relu)
    layers = ["blocks.0"] if blocks else ["relu", "blocks.1"]
    teacher = Distillation(student, hidden=1.0, layers=layers)
    student(torch.randn(4, 16))
    if blocks:
        with pytest.raises(ValueError, match=r"blocks\.0: another module works on its output in place"):
            teacher.loss()
    else:
        assert float(teacher.loss().detach()) == pytest.approx(0.0, abs=1e-6)


def test_a_teacher_that_is_evaluated_keeps_no_hidden_states(net):
    dense = copy.deepcopy(net)
    outputs: list[weakref.ref[torch.Tensor]] = []
    dense.blocks[0].register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    teacher = Distillation(net, dense, hidden=1.0)
    with torch.no_grad():
        for _ in range(3):
            dense(batch(0)[0])
    gc.collect()
    assert len(outputs) == 3 and all(one() is None for one in outputs)
    net(batch(0)[0])
    assert float(teacher.loss().detach()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_the_divergence_of_hinton_and_its_gradient(net, temperature):
    dense = copy.deepcopy(net)
    teacher = Distillation(net, logits=0.5, task=2.0, temperature=temperature)
    with torch.no_grad():
        for one in net.parameters():
            one.add_(0.1 * torch.randn_like(one))
    inputs, labels = batch(0)
    task = nn.functional.cross_entropy(net(inputs), labels)
    loss = teacher.loss(task)
    own = torch.autograd.grad(loss, list(net.parameters()))
    output = net(inputs)
    teacher.reset()
    divergence = nn.functional.kl_div(
        (output / temperature).log_softmax(-1), (dense(inputs) / temperature).softmax(-1), reduction="batchmean"
    )
    expected = 2.0 * nn.functional.cross_entropy(output, labels) + 0.5 * temperature**2 * divergence
    assert torch.allclose(loss, expected, rtol=1e-4)
    for one, other in zip(own, torch.autograd.grad(expected, list(net.parameters())), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)
    assert set(teacher.metrics()) == {"distill/logits", "distill/task"}


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("layers", [None, "blocks.*", ["blocks.0", "blocks.2.1"]])
def test_hidden_states_of_chosen_layers(net, kind, layers):
    dense = copy.deepcopy(net)
    teacher = Distillation(net, logits=0.0, hidden=1.0, layers=layers, hidden_loss=kind)
    prune_(net, "2:4")
    names = [f"blocks.{number}" for number in range(3)] if layers != ["blocks.0", "blocks.2.1"] else layers
    inputs, _ = batch(1)
    seen: dict[tuple[int, str], torch.Tensor] = {}
    for number, one in enumerate((net, dense)):
        for name in names:
            one.get_submodule(name).register_forward_hook(
                lambda module, args, output, key=(number, name): seen.__setitem__(key, output)
            )
    net(inputs)
    dense(inputs)
    parts = []
    for name in names:
        own, theirs = seen[0, name], seen[1, name]
        if kind == "mse":
            parts.append((own - theirs).square().sum() / theirs.square().sum())
        else:
            parts.append(1 - nn.functional.cosine_similarity(own, theirs, dim=1).mean())
    assert torch.allclose(teacher.loss(), torch.stack(parts).mean(), rtol=1e-5)


def test_padding_does_not_count(net):
    teacher = Distillation(net, hidden=1.0)
    prune_(net, "2:4")
    inputs = torch.randn(2, 5, 16)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 2:] = 0
    net(inputs, attention_mask=mask)
    one = teacher.loss()
    net(torch.where(mask[..., None] == 0, 99.0, inputs), attention_mask=mask)
    assert torch.allclose(one, teacher.loss())
    net(inputs)
    assert not torch.allclose(one, teacher.loss())


def test_the_teacher_is_frozen_in_eval_mode_and_draws_no_random_numbers():
    torch.manual_seed(0)
    net = Blocks(dropout=0.5)
    before = copy.deepcopy(net.state_dict())
    teacher = Distillation(net)
    assert not any(one.requires_grad for one in teacher.teacher.parameters())
    sparsify_(net, "4:8-T")
    inputs, labels = batch(0)
    outputs = []
    for taught in (False, True):
        torch.manual_seed(5)
        teacher.reset()
        loss = nn.functional.cross_entropy(net(inputs), labels)
        if taught:
            teacher.loss(loss).backward()
        teacher.reset()
        outputs.append(net(inputs))  # the same dropout, whether the teacher ran or not
    assert torch.equal(*outputs)
    assert all(torch.equal(value, before[name]) for name, value in teacher.teacher.state_dict().items())
    assert all(one.grad is None for one in teacher.teacher.parameters())


def test_the_student_is_saved_and_copied_without_its_teacher(net):
    keys = set(net.state_dict())
    teacher = Distillation(net)
    assert set(net.state_dict()) == keys
    pickled = io.BytesIO()
    torch.save(net, pickled)
    assert len(pickled.getvalue()) < 30_000
    twin = copy.deepcopy(net)
    twin(batch(0)[0])
    with pytest.raises(ValueError, match="no training forward pass"):
        teacher.loss()
    with pytest.raises(TypeError, match="one student"):
        copy.deepcopy(teacher)
    net(batch(0)[0])
    teacher.detach()
    assert not net._forward_hooks
    net(batch(0)[0])
    with pytest.raises(ValueError, match="no training forward pass"):
        teacher.loss()


def test_only_training_passes_count_and_each_needs_its_loss(net):
    teacher = Distillation(net)
    inputs, _ = batch(0)
    net.eval()(inputs)
    with torch.no_grad():
        net.train()(inputs)
    with pytest.raises(ValueError, match="no training forward pass"):
        teacher.loss()
    net(inputs)
    net(inputs)
    with pytest.raises(ValueError, match="2 training forward passes"):
        teacher.loss()
    teacher.reset()
    net(inputs)
    teacher.loss()


class Checkpointed(Blocks):
    reentrant = False

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            inputs = torch.utils.checkpoint.checkpoint(block, inputs, use_reentrant=self.reentrant)
        return self.head(inputs)


def test_activation_checkpointing(net):
    gradients = []
    for kind in (Blocks, Checkpointed):
        student = kind()
        student.load_state_dict(net.state_dict())
        teacher = Distillation(student, hidden=1.0)
        prune_(student, "2:4")
        student(batch(0)[0].requires_grad_())
        teacher.loss().backward()
        gradients.append([one.grad for one in student.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    student = Checkpointed()
    student.reentrant = True
    teacher = Distillation(student, hidden=1.0)
    student(batch(0)[0].requires_grad_())
    with pytest.raises(ValueError, match="use_reentrant=False"):
        teacher.loss()


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_compiled_without_graph_breaks(net, mode):
    torch._dynamo.reset()
    teacher = Distillation(net, hidden=1.0)
    sparsity = sparsify_(net, "4:8-T", mode=mode, refresh=2, decay=FixedDecay(0.01))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    twin_losses, losses = [], []
    try:
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        for number in range(4):
            inputs, labels = batch(number)
            state = copy.deepcopy(net.state_dict())
            loss = teacher.loss(nn.functional.cross_entropy(compiled(inputs), labels))
            loss.backward()
            losses.append(float(loss.detach()))
            assert net.state_dict().keys() == state.keys()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch._dynamo.reset()
    torch.manual_seed(3)
    other = Blocks()
    teacher = Distillation(other, hidden=1.0)
    sparsity = sparsify_(other, "4:8-T", mode=mode, refresh=2, decay=FixedDecay(0.01))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    for number in range(4):
        inputs, labels = batch(number)
        loss = teacher.loss(nn.functional.cross_entropy(other(inputs), labels))
        loss.backward()
        twin_losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(twin_losses, rel=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_mixed_precision_and_a_teacher_in_half_the_memory(net, dtype):
    teacher = Distillation(net, hidden=1.0, dtype=dtype)
    assert {one.dtype for one in teacher.teacher.parameters()} == {dtype or torch.float32}
    inputs, labels = batch(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(inputs)
    loss = teacher.loss(nn.functional.cross_entropy(output.float(), labels))
    assert float(teacher.terms["logits"]) < 1e-3  # the same weights, the same arithmetic
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert all(bool(torch.isfinite(one).all()) for one in net.parameters())


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_accumulated_batches_are_one_large_batch(net, mode):
    results = []
    for parts in (1, 2):
        student = copy.deepcopy(net)
        teacher = Distillation(student, hidden=1.0, hidden_loss="cosine")
        sparsity = sparsify_(student, "4:8-T", mode=mode, refresh=1, decay=FixedDecay(0.1))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        sparsity.attach(optimizer)
        for number in range(3):
            inputs, labels = batch(number)
            for x, y in zip(inputs.chunk(parts), labels.chunk(parts), strict=True):
                (teacher.loss(nn.functional.cross_entropy(student(x), y)) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        finalize_(student)
        assert verify(student.blocks[0][0].weight, "4:8-T")
        results.append(student.state_dict())
    assert all(torch.allclose(value, results[1][name], atol=1e-5) for name, value in results[0].items())


def test_a_resumed_run_is_bit_equal_and_another_teacher_is_refused(net):
    dense = copy.deepcopy(net.state_dict())

    def start(weights):
        student = Blocks()
        student.load_state_dict(weights)
        teacher = Distillation(student, hidden=0.5, dtype=torch.bfloat16)
        sparsity = sparsify_(student, "4:8-T", refresh=2, decay=1.0, steps=6)
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
        return student, teacher, sparsity.attach(optimizer), optimizer

    def train(student, teacher, optimizer, numbers):
        for number in numbers:
            inputs, labels = batch(number)
            teacher.loss(nn.functional.cross_entropy(student(inputs), labels)).backward()
            optimizer.step()
            optimizer.zero_grad()

    student, teacher, sparsity, optimizer = start(dense)
    train(student, teacher, optimizer, range(3))
    held = io.BytesIO()
    parts = {"student": student, "teacher": teacher, "sparsity": sparsity, "optimizer": optimizer}
    torch.save({name: part.state_dict() for name, part in parts.items()}, held)
    train(student, teacher, optimizer, range(3, 6))
    held.seek(0)
    saved = torch.load(held, weights_only=True)
    again, other, resumed, second = start(dense)
    for part, name in ((again, "student"), (other, "teacher"), (resumed, "sparsity"), (second, "optimizer")):
        part.load_state_dict(saved[name])
    train(again, other, second, range(3, 6))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())
    _, wrong, _, _ = start({name: value + 0.01 for name, value in dense.items()})
    with pytest.raises(ValueError, match="the teacher differs"):
        wrong.load_state_dict(saved["teacher"])
    with pytest.raises(ValueError, match="without a teacher"):
        wrong.load_state_dict({})


def test_a_teacher_from_a_folder_or_a_module(net, tmp_path):
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    dense = copy.deepcopy(net)
    prune_(net, "2:4")
    inputs, _ = batch(0)
    losses = []
    for given in (tmp_path, dense):
        teacher = Distillation(net, given)
        net(inputs)
        losses.append(teacher.loss().item())
        teacher.detach()
    assert losses[0] == losses[1] > 0
    assert teacher.teacher is dense and not dense.training
    half = Distillation(net, dense, dtype=torch.bfloat16)
    assert half.teacher is not dense and dense.head.weight.dtype == torch.float32
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks"):
        Distillation(net, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors"):
        Distillation(net, tmp_path)


def pruned(model):
    prune_(model, "2:4")
    return {}


def static(model):
    sparsify_(model, "4:8-T", mode="static")
    return {}


def dynamic(model):
    sparsify_(model, "4:8-T")
    return {}


@pytest.mark.parametrize("change", [pruned, static, dynamic])
def test_a_sparse_model_is_no_dense_teacher(net, change):
    change(net)
    with pytest.raises(ValueError, match=r"already sparse.*teacher="):
        Distillation(net)
    Distillation(net, Blocks())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"logits": 0.0}, "at least one must be positive"),
        ({"logits": -1.0}, "logits=-1.0"),
        ({"temperature": 0.0}, "positive"),
        ({"layers": "blocks.*"}, "hidden=0"),
        ({"hidden": 1.0, "layers": "nothing.*"}, "matches no module"),
        ({"hidden": 1.0, "hidden_loss": "l1"}, "expected one of"),
        ({"dtype": torch.int8}, "floating-point"),
        ({"teacher": 3}, "expected a module"),
        ({"hidden": 1.0, "teacher": nn.Linear(16, 8)}, "the teacher has no module"),
    ],
)
def test_bad_input_leaves_no_hooks(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        Distillation(net, **arguments)
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(ValueError, match="shares parameters"):
        Distillation(net, net)


def test_a_student_that_cannot_be_copied_needs_a_teacher(net):
    class Computed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.kept = inner(torch.randn(2, 16)).sum()  # no leaf, which torch does not copy

        def forward(self, inputs):
            return self.inner(inputs)

    student = Computed(nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"the student cannot be copied .* pass a teacher"):
        Distillation(student)
    Distillation(student, nn.Linear(16, 16))


def test_outputs_that_do_not_fit(net):
    teacher = Distillation(net, nn.Linear(16, 9))
    net(batch(0)[0])
    with pytest.raises(ValueError, match="expected the same"):
        teacher.loss()
    regression = nn.Linear(16, 1)
    teacher = Distillation(regression)
    regression(batch(0)[0])
    with pytest.raises(ValueError, match="always 0"):
        teacher.loss()
    lists = nn.LSTM(16, 16)
    teacher = Distillation(lists, output=lambda output: output[0])
    lists(batch(0)[0])
    assert abs(teacher.loss().item()) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_classes_that_the_teacher_excludes_add_nothing(temperature: float) -> None:
    student, teacher = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    teacher[:, 3] = -torch.inf
    student[:3, 3] = -torch.inf
    keep = [0, 1, 2, 4, 5, 6, 7, 8]
    own, given = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    expected = (given.exp() * (given - own))[:, keep].sum(-1).mean() * temperature**2
    student.requires_grad_()
    found = logit_divergence(student, teacher, temperature)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert student.grad is not None and bool(student.grad.isfinite().all())
    nothing = torch.zeros(6, 9, dtype=torch.float64)
    nothing[0, 0] = torch.nan
    assert bool(logit_divergence(nothing, teacher, temperature).isnan())
