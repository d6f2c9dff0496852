"""A parameter takes part wherever a closure uses it, or an error says where it cannot."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import jetplane as jp

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*prototype:UserWarning")


def slope(closure, params, **options):
    """One number for each entry of the parameters."""
    size = sum(p.numel() for p in params)
    eye = torch.eye(size, dtype=params[0].dtype).split([p.numel() for p in params], 1)
    tangents = [e.reshape(size, *p.shape) for e, p in zip(eye, params, strict=True)]
    return jp.evaluate(closure, params, tangents, "none", **options).slope


def gradient(closure, params):
    leaves = [p.requires_grad_() for p in params]
    return torch.cat([g.flatten() for g in torch.autograd.grad(closure(), leaves, materialize_grads=True)])


class Stacked:
    """An ensemble by functional_call under vmap, beside a parameter that is used plainly."""

    def __init__(self):
        nets = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(3)]
        self.stacked, _ = torch.func.stack_module_state(nets)
        self.stacked = {name: t.detach() for name, t in self.stacked.items()}
        self.net, self.scale, self.x = nets[0], torch.ones(1, dtype=torch.float64), torch.randn(5, 3).double()
        self.params = [self.scale, *self.stacked.values()]

    def closure(self):
        each = torch.vmap(lambda p: torch.func.functional_call(self.net, p, (self.x,)))(self.stacked)
        return F.cross_entropy(self.scale * each.flatten(0, 1), torch.arange(15) % 2)


def ensemble():
    made = Stacked()
    return made.closure, made.params


def scripted():
    net = nn.Sequential(torch.jit.script(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3).double()
    return lambda: net(x).square().mean(), list(net.parameters())


def scripted_after_training():
    """TorchScript has optimized what it ran with gradients: it differentiates that itself, apart from autograd."""
    net = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Tanh())), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3).double()
    for _ in range(3):
        net(x).square().mean().backward()
    return lambda: net(x).square().mean(), list(net.parameters())


def scripted_in_threads():
    net = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))).double()
    x = torch.randn(4, 3).double()

    def closure():
        with ThreadPoolExecutor(2) as pool:
            return torch.stack(list(pool.map(lambda rows: net(rows).square().mean(), x.split(2)))).sum()

    closure()
    return closure, list(net.parameters())


def traced():
    x = torch.randn(5, 3).double()
    net = torch.jit.trace(nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double(), x)
    return lambda: net(x).square().mean(), list(net.parameters())


@torch.jit.script
def scripted_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sin()


def scripted_function():
    w, x = torch.randn(4).double(), torch.randn(4).double()
    return lambda: scripted_product(w, x).sum(), [w]


def gradients_inside():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(5, 3).double()
    field = torch.vmap(torch.func.grad(lambda point: net(point).squeeze()))
    return lambda: field(x).square().sum() + net(x).sum(), list(net.parameters())


def jacobian_inside():
    w, x = torch.randn(3).double(), torch.randn(3).double()
    return lambda: torch.func.jacrev(lambda z: (w * z) ** 3)(x).sum() + w.sum(), [w]


def pullback_inside():
    w, x = torch.randn(3).double(), torch.randn(3).double()
    return lambda: (w * torch.func.vjp(lambda z: (w * z) ** 3, x)[1](x)[0]).sum(), [w]


def gradient_in_the_parameter():
    w, x = torch.randn(3).double(), torch.randn(3).double()
    return lambda: torch.func.grad(lambda u: ((u * x) ** 3).sum())(w).square().sum(), [w]


def jagged():
    each = [torch.randn(1, 2), torch.randn(3, 2)]
    rows = torch.nested.nested_tensor([t.double() for t in each], layout=torch.jagged)
    layer, w = nn.Linear(2, 2).double(), torch.randn(2, 2).double()
    return lambda: (layer(rows) @ w).values().sin().sum() + w.sum(), [*layer.parameters(), w]


def new_threads():
    w = torch.randn(3).double()

    def closure():
        found = []
        threads = [threading.Thread(target=lambda n=n: found.append((w**n).sum())) for n in (2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(found) + w.sum()

    return closure, [w]


def pool():
    w, held = torch.randn(3).double(), nn.Linear(3, 1).double()
    workers = ThreadPoolExecutor(2)
    workers.submit(int).result()  # its threads are there before the evaluation

    def closure():
        parts = workers.map(lambda n: held(w**n).square().sum(), (1, 2, 3))
        return sum(parts) + w.sum()

    return closure, [w, *held.parameters()]


def written_by_threads():
    w = torch.randn(3).double()

    def closure():
        out = torch.zeros(3, dtype=torch.float64)
        with ThreadPoolExecutor(2) as workers:
            for i in range(3):
                workers.submit(lambda i: out.__setitem__(i, w[i] ** 2), i).result()
        return out.sum() + w.sum()

    return closure, [w]


CARRIED = [
    ensemble, scripted, scripted_after_training, scripted_in_threads, traced, scripted_function, gradients_inside,
    jacobian_inside, pullback_inside, gradient_in_the_parameter, jagged, new_threads, pool, written_by_threads,
]  # fmt: skip


@pytest.mark.parametrize("make", CARRIED, ids=lambda f: f.__name__)
def test_carried(make):
    torch.manual_seed(0)
    closure, params = make()
    for _ in range(3):  # what an evaluation, or reverse mode, leaves behind must not change the next
        torch.testing.assert_close(slope(closure, params), gradient(closure, params), rtol=1e-9, atol=1e-11)


def test_detach_inside_of_a_script_is_refused_or_stops():
    """TorchScript detaches inputs of what it has optimized for gradients, which looks the same."""

    @torch.jit.script
    def loss(x, w):
        return (x @ w.detach()).sin().sum() + (w * w).sum()

    x, w = torch.randn(4, 3).double(), torch.ones(3).double().requires_grad_()
    with pytest.raises(jp.DerivativeError, match="take detach\\(\\) out of the script"):
        slope(lambda: loss(x, w), [w])


def test_errors_in_a_script_are_ours():
    net = torch.jit.script(nn.Sequential(nn.Linear(3, 4), Rounds()))
    with pytest.raises(jp.MissingRuleError, match="bessel_j0"):
        slope(lambda: net(torch.ones(2, 3)).sum(), list(net.parameters()))


class Rounds(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_scripts_are_optimized_again_afterwards():
    closure, params = scripted()
    before = torch._C._get_graph_executor_optimize()
    slope(closure, params)
    assert torch._C._get_graph_executor_optimize() == before


def test_curvature_through_vmap():
    torch.manual_seed(0)
    closure, params = ensemble()
    for p in params:
        p.requires_grad_()
    tangents = jp.Directions(3).tangents(params)
    plane = jp.evaluate(closure, params, tangents)
    exact = jp.testing.grad_of_grad(closure, params, tangents)
    torch.testing.assert_close(plane.curvature, exact.curvature, rtol=1e-8, atol=1e-10)
    gauss_newton = jp.evaluate(closure, params, tangents, "ggn").curvature
    assert bool((torch.linalg.eigvalsh(gauss_newton) > 0).all())


W = torch.tensor([2.0])
X = torch.tensor([1.0])


def dual():
    with torch.autograd.forward_ad.dual_level():
        number = torch.autograd.forward_ad.make_dual(X, X)
        return torch.autograd.forward_ad.unpack_dual((W * number) ** 2).tangent.sum()


REFUSED = {
    "torch.autograd.forward_ad": (lambda: dual() + W.sum(), "torch.autograd.forward_ad inside"),
    "torch.autograd.grad in a parameter": (
        lambda: torch.autograd.grad(W.sum(), W)[0].sum(), "torch.autograd.grad with respect to parameters"
    ),
    "torch.autograd.grad in a tensor that starts no graph": (
        lambda: torch.autograd.grad((y := W * X).sum(), y)[0].sum(), r"call requires_grad_\(\) on the tensor"
    ),
    "backward": (lambda: (W * X.clone().requires_grad_()).sum().backward(), r"backward\(\) inside"),
    "torch.func.jvp": (
        lambda: torch.func.jvp(lambda z: (W * z) ** 3, (X,), (X,))[1].sum() + W.sum(), "inside a transform of torch"
    ),
    "data_ptr": (lambda: (W * (W.data_ptr() % 2)).sum(), "data_ptr"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    closure, message = REFUSED[name]
    with pytest.raises(jp.DerivativeError, match=message) as raised:
        jp.evaluate(closure, [W], [torch.ones(1, 1)])
    assert "test_seen.py:" in str(raised.value)


def test_requires_grad_of_data_is_let_be():
    def closure():
        x = torch.ones(3)
        x.requires_grad_()
        return (W * x).sum()

    assert slope(closure, [W]).item() == 3


class Worker:
    """A thread that takes functions from a queue."""

    def __init__(self):
        self.tasks, self.results = queue.Queue(), queue.Queue()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        while (task := self.tasks.get()) is not None:
            try:
                self.results.put(task())
            except jp.DerivativeError as error:
                self.results.put(error)

    def __call__(self, task):
        self.tasks.put(task)
        return self.results.get(timeout=10)


@pytest.mark.parametrize("kind", [torch.Tensor, nn.Parameter])
def test_a_thread_that_takes_no_part_is_refused(kind):
    w, worker = torch.ones(3), Worker()
    w = nn.Parameter(w) if kind is nn.Parameter else w

    def closure():
        worker(lambda: (w**2).sum())
        return w.sum()

    with pytest.raises(jp.DerivativeError, match="another thread evaluates") as raised:
        jp.evaluate(closure, [w], [torch.ones(1, 3)])
    assert "test_seen.py:" in str(raised.value) and type(w) is kind

    seen = []

    def reading():  # values alone
        seen.append(worker(lambda: w.detach().sum().item()))
        with torch.no_grad():
            seen.append(w.shape)
        return w.sum()

    assert torch.equal(jp.evaluate(reading, [w], [torch.ones(1, 3)], "none").slope, torch.tensor([3.0]))
    assert seen == [3.0, w.shape] and type(w) is kind
    worker.tasks.put(None)
    worker.thread.join()


@pytest.mark.parametrize("ask", [lambda p: p.is_meta, lambda p: p.ndim, lambda p: torch.zeros_like(p), lambda p: p > 0])
def test_other_threads_may_ask_about_parameters(ask):
    w, jobs, done = torch.ones(3), queue.Queue(), queue.Queue()
    worker = threading.Thread(target=lambda: done.put(ask(jobs.get())))
    worker.start()

    def closure():
        jobs.put(w)
        done.get(timeout=10)
        return (w**2).sum()

    assert jp.evaluate(closure, [w], [torch.ones(1, 3)], "none").slope.item() == 6
    worker.join()


def test_a_task_that_outlives_its_evaluation_is_left_alone():
    w, go, out = torch.ones(2), threading.Event(), []

    def late():
        go.wait(10)
        made = (w * 2).requires_grad_()
        out.append((made, made.is_inference()))

    def closure():
        threads.append(threading.Thread(target=late))
        threads[0].start()
        return w.sum()

    threads = []
    jp.evaluate(closure, [w], [torch.ones(1, 2)])
    go.set()
    threads[0].join()
    made, inference = out[0]
    assert type(made) is torch.Tensor and not inference
    (made**2).sum().backward()
    assert torch.equal(made.grad, torch.full((2,), 4.0))


def test_several_evaluations_at_once():
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    params, before = list(shared.parameters()), [type(p) for p in shared.parameters()]
    data = [(torch.randn(6, 3).double(), torch.randint(0, 2, (6,))) for _ in range(4)]
    barrier, found = threading.Barrier(4), {}

    def loss(n):
        x, y = data[n]
        return F.cross_entropy(shared(x), y)

    def run(n):
        def closure():
            barrier.wait(30)
            try:
                return loss(n) + jp.laplacian(lambda z: (z**2).sum(), params[0][0]) * params[3].sum()
            finally:
                barrier.wait(30)

        found[n] = jp.evaluate(closure, params, jp.Directions(3, seed=n), "ggn" if n % 2 else "hessian")

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        alone = jp.evaluate(
            lambda n=n: loss(n) + 6 * params[3].sum(), params, jp.Directions(3, seed=n), "ggn" if n % 2 else "hessian"
        )
        torch.testing.assert_close(found[n].slope, alone.slope, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found[n].curvature, alone.curvature, rtol=1e-12, atol=1e-14)
    assert [type(p) for p in params] == before
    assert all(type(t) is torch.Tensor for t in tree_leaves([found[0].slope, found[0].curvature]))


ROWS = [torch.ones(2, 3).double(), torch.ones(4, 3).double()]
as_nested = torch.nested.as_nested_tensor
NESTED = {
    "strided": lambda w: torch.nested.nested_tensor(ROWS).matmul(w).to_padded_tensor(0.0).square().sum(),
    "strided, of jets": lambda w: as_nested([x @ w for x in ROWS]).to_padded_tensor(0.0).sum(),
    "jagged, of jets": lambda w: as_nested([x @ w for x in ROWS], layout=torch.jagged).values().sum(),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", NESTED)
def test_other_nested_tensors_are_refused(name):
    w = torch.eye(3).double().requires_grad_()
    with pytest.raises(jp.DerivativeError, match="nested|Nested"):
        jp.evaluate(lambda: NESTED[name](w), [w], [torch.ones(1, 3, 3).double()], "none")
