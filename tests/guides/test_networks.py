"""Networks of other libraries: TyXe, torchvision's shape, Hugging Face.

Each is fitted, its precision compared with dense derivatives in float64, and predicts.
torchvision is a stand-in: it has no build for every CPU build of torch.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import tyxe
from peft import LoraConfig, get_peft_model
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import NoObservedSiteWarning
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import LastLayer, RandomSubnet
from tests.tolerances import tolerance

AUTOGRAD = tolerance(torch.float64, "autograd")
DOUBLE = torch.float64
CLASSES = 3


def categorical_precision(
    logits: Callable[[dict[str, Tensor]], Tensor],
    values: dict[str, Tensor],
    chosen: dict[str, Tensor],
) -> Tensor:
    """GGN of softmax classes plus a standard normal prior, by dense derivatives."""
    jac = torch.func.jacrev(logits)(values)
    columns = [jac[site].flatten(2)[:, :, at] for site, at in chosen.items()]
    rows = torch.cat(columns, dim=2)
    p = logits(values).softmax(-1)
    fisher = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)
    ggn = torch.einsum("nci,ncd,ndj->ij", rows, fisher, rows)
    return ggn + torch.eye(len(ggn), dtype=ggn.dtype)


# ----------------------------------------------------------------------------------
# TyXe: a network made Pyro's in place, a likelihood object, guides built from a model.


def small_net() -> nn.Module:
    layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    return layers.to(DOUBLE)


def tyxe_prior() -> Any:
    zero, one = torch.zeros((), dtype=DOUBLE), torch.ones((), dtype=DOUBLE)
    return tyxe.priors.IIDPrior(dist.Normal(zero, one))


def test_tyxe_variational_bnn() -> None:
    x, y = torch.randn(15, 4, dtype=DOUBLE), torch.randint(CLASSES, (15,))
    plain, likelihood = small_net(), tyxe.likelihoods.Categorical(15)
    bnn = tyxe.VariationalBNN(small_net(), tyxe_prior(), likelihood, AutoNormal)
    guide = AutoSubnetLaplace(bnn.model, RandomSubnet(14))
    svi = SVI(bnn.model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(60):
        svi.step(x, y)
    posterior = guide.laplace_approximation(x, y)

    def logits(values: dict[str, Tensor]) -> Tensor:
        named = {site.removeprefix("net."): v for site, v in values.items()}
        return functional_call(plain, named, (x,))

    expected = categorical_precision(
        logits, posterior.median(), dict(posterior.subnet.indices)
    )
    found = posterior.get_posterior().precision_matrix
    assert_close(found, expected, **AUTOGRAD)
    draws = Predictive(posterior.linearized_model, guide=posterior, num_samples=5)(x)
    assert draws["likelihood.data"].shape == (5, 15)


def test_a_tyxe_guide_of_the_network_alone_says_what_it_misses() -> None:
    """Pyro's guide, built so, has the prior for its posterior, and says nothing."""
    x = torch.randn(15, 4, dtype=DOUBLE)
    bnn = tyxe.PytorchBNN(small_net(), tyxe_prior(), AutoSubnetLaplace)
    bnn.net_guide(x)
    with pytest.warns(NoObservedSiteWarning, match="pass the full model"):
        bnn.net_guide.laplace_approximation(x)


# ----------------------------------------------------------------------------------
# torchvision: stages of blocks, named as there.


class BasicBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False),
                nn.BatchNorm2d(planes),
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (4, 6)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inplanes = widths[0]
        for i, planes in enumerate(widths, start=1):
            stage = nn.Sequential(
                BasicBlock(inplanes, planes, 1 if i == 1 else 2),
                BasicBlock(planes, planes),
            )
            setattr(self, f"layer{i}", stage)
            inplanes = planes
        self.num_stages = len(widths)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


@pytest.mark.filterwarnings(  # a share of so small a network is the weights at rest
    "ignore::pyro_subnet.exceptions.NoOutputVarianceWarning"
)
@pytest.mark.parametrize(
    "subnet", [RandomSubnet(25), LastLayer(), 0.01], ids=["random", "last", "share"]
)
def test_torchvision_resnet(subnet: Any) -> None:
    """A trained network with in-place activations, taken as it is."""
    net = ResNet().to(DOUBLE)
    x = torch.randn(6, 3, 30, 30, dtype=DOUBLE)
    y = torch.randint(CLASSES, (6,))
    for _ in range(5):
        net(x)  # fills the running statistics
    net.eval()
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits

    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_module(net))
    posterior = guide.laplace_approximation(x, y)

    def logits(values: dict[str, Tensor]) -> Tensor:
        return functional_call(net, values, (x,))

    expected = categorical_precision(
        logits, posterior.median(), dict(posterior.subnet.indices)
    )
    found = posterior.get_posterior().precision_matrix
    assert_close(found, expected, **AUTOGRAD)
    assert posterior.output_distribution(x).event_shape == (CLASSES,)
    assert_close(net(x), logits(posterior.median()), **AUTOGRAD)


# ----------------------------------------------------------------------------------
# Hugging Face: keyword dicts in, an ordered dict with attributes out.


class ModelOutput(OrderedDict[str, Tensor]):
    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class EncoderForSequenceClassification(nn.Module):
    def __init__(self, vocabulary: int = 11, width: int = 8, length: int = 9):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word": nn.Embedding(vocabulary, width, padding_idx=0),
                "position": nn.Embedding(length, width),
            }
        )
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> ModelOutput | tuple[Tensor, ...]:
        assert input_ids is not None
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.embeddings["word"](input_ids) + self.embeddings["position"](
            places
        )
        hidden = self.norm(hidden)
        scores = self.query(hidden) @ self.key(hidden).mT / hidden.shape[-1] ** 0.5
        if attention_mask is not None:
            hidden_mask = (1.0 - attention_mask[:, None, :].to(scores)) * -1e4
            scores = scores + hidden_mask
        hidden = hidden + self.dropout(scores.softmax(-1)) @ self.value(hidden)
        logits = self.classifier(torch.tanh(hidden[:, 0]))
        if not return_dict:
            return (logits,)
        return ModelOutput(logits=logits)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("in_batches", [False, True])
@pytest.mark.parametrize("make", [bert, EncoderForSequenceClassification])
def test_hugging_face_classifier(
    make: Callable[[], nn.Module], in_batches: bool
) -> None:
    net = make().to(DOUBLE).eval()
    batch = {
        "input_ids": torch.randint(1, 11, (10, 7)),
        "attention_mask": (torch.arange(7) < torch.arange(10).unsqueeze(1) % 5 + 3),
    }
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    batch["attention_mask"] = batch["attention_mask"].long()
    labels = torch.randint(CLASSES, (10,))
    bnn = bayesianize(net)

    def model(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        outputs = bnn(input_ids=input_ids, attention_mask=attention_mask)
        with pyro.plate("data", len(input_ids)):
            pyro.sample("label", dist.Categorical(logits=outputs.logits), obs=labels)
        return outputs.logits

    init = init_to_module(net)
    guide = AutoSubnetLaplace(model, RandomSubnet(40), init_loc_fn=init)
    if in_batches:
        whole = {**batch, "labels": labels}
        loader = [{k: v[i : i + 4] for k, v in whole.items()} for i in (0, 4, 8)]
        posterior = guide.laplace_approximation_from(loader)
    else:
        posterior = guide.laplace_approximation(**batch, labels=labels)

    def logits(values: dict[str, Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(net, values, (), dict(batch)).logits

    expected = categorical_precision(
        logits, posterior.median(), dict(posterior.subnet.indices)
    )
    found = posterior.get_posterior().precision_matrix
    assert_close(found, expected, **AUTOGRAD)
    distribution = posterior.output_distribution(**batch)
    assert distribution.batch_shape == (10,)
    draws = Predictive(posterior.linearized_model, guide=posterior, num_samples=4)
    assert draws(**batch)["label"].shape == (4, 10)


def adapted(dtype: torch.dtype) -> nn.Module:
    """A classifier whose attention has adapters of rank 2, moved from their start."""
    torch.manual_seed(0)
    adapters = LoraConfig(
        r=2, lora_alpha=4, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    net = get_peft_model(bert(), adapters).to(dtype).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net


# peft reads what transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("share", [None, 0.2])
def test_adapters_of_a_frozen_transformer(dtype: torch.dtype, share: Any) -> None:
    """D counts what is trained; the backbone is held once; dictionaries are batches."""
    net = adapted(dtype)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    bnn = bayesianize(net)
    for name, parameter in net.named_parameters():
        own = bnn.net.get_buffer(name)
        assert (own.data_ptr() == parameter.data_ptr()) == (name not in trained)

    def model(
        input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> None:
        outputs = bnn(input_ids=input_ids, attention_mask=attention_mask)
        with pyro.plate("data", len(input_ids)):
            pyro.sample("label", dist.Categorical(logits=outputs.logits), obs=labels)

    words = torch.randint(1, 11, (10, 7))
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    inputs["attention_mask"][::2, 5:] = 0
    rows = [
        {key: value[i] for key, value in inputs.items()} | {"labels": i % CLASSES}
        for i in range(10)
    ]
    subnet = None if share is None else RandomSubnet(share, seed=1)
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_module(net))
    posterior = guide.laplace_approximation_from(DataLoader(rows, batch_size=4))
    assert posterior.subnet.num_params == sum(p.numel() for p in trained.values())

    exact = copy.deepcopy(net).double()

    def logits(values: dict[str, Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(exact, values, (), dict(inputs)).logits

    values = {site: value.double() for site, value in posterior.median().items()}
    expected = categorical_precision(logits, values, dict(posterior.subnet.indices))
    found = posterior.get_posterior().precision_matrix
    assert_close(found, expected.to(dtype), **tolerance(dtype, "autograd"))
    assert posterior.predictive_distribution(**inputs).probs.shape == (10, CLASSES)
