import copy
import gzip
import math
import struct
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsGGN
from matplotlib.image import imread
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness.journal import read
from benchmarks.harness.runner import Only, run
from benchmarks.harness.task import Settings
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.images import (
    baselines,
    cifar10,
    corrupted,
    evaluation,
    fashion,
    methods,
    published,
    reporting,
    resnet18,
    rivals,
    rotated,
)
from benchmarks.paper.images.case import (
    BY_EVIDENCE,
    CURVE,
    ON_SHIFT,
    OWN_PRIOR,
    WITHIN_ERRORS,
    at_temperature,
    mixture,
    nll,
)
from benchmarks.paper.images.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from benchmarks.paper.images.networks import make_network, num_params
from benchmarks.paper.images.readers import (
    Part,
    read_cifar_batch,
    read_idx,
    read_images,
    to_unit,
)
from benchmarks.paper.images.swag import Swag, swag, with_weights
from benchmarks.paper.images.training import Networks, Recipe, batches, fit
from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.nn import init_to_module


def write_idx(path, array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    header += struct.pack(f">{array.ndim}i", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_sets(folder, num_train=40, num_test=12):
    """All three sets, of random pixels, in the published formats."""
    rng = np.random.default_rng(0)
    for name in ("mnist", "fashion-mnist"):
        for part, count in (("train", num_train), ("t10k", num_test)):
            pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            labels = (np.arange(count) % 10).astype(np.uint8)
            write_idx(folder / name / f"{part}-images-idx3-ubyte.gz", pixels)
            write_idx(folder / name / f"{part}-labels-idx1-ubyte.gz", labels)
    own = folder / "cifar-10-batches-bin"
    own.mkdir()
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name in names:
        rows = rng.integers(0, 256, (num_test, 1 + 3072), dtype=np.uint8)
        rows[:, 0] = np.arange(num_test) % 10
        (own / name).write_bytes(rows.tobytes())


class TestReaders:
    def test_idx_bytes_by_hand(self, tmp_path):
        raw = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255])
        (tmp_path / "x.gz").write_bytes(gzip.compress(raw))
        assert read_idx(tmp_path / "x.gz").tolist() == [[1, 2, 3], [4, 5, 255]]

    def test_idx_of_another_type_is_refused(self, tmp_path):
        (tmp_path / "x.gz").write_bytes(gzip.compress(bytes([0, 0, 13, 1, 0, 0, 0, 0])))
        with pytest.raises(ValueError, match="must be an idx file of bytes"):
            read_idx(tmp_path / "x.gz")

    def test_cifar_bytes_by_hand(self, tmp_path):
        red, green, blue = (bytes([value]) * 1024 for value in (10, 20, 30))
        blue = blue[:-1] + b"\x1f"
        (tmp_path / "b.bin").write_bytes(b"\x07" + red + green + blue)
        images, labels = read_cifar_batch(tmp_path / "b.bin")
        assert images.shape == (1, 3, 32, 32)
        assert labels.tolist() == [7]
        assert images[0, :, 0, 0].tolist() == [10, 20, 30]
        assert images[0, :, 31, 31].tolist() == [10, 20, 31]

    @pytest.mark.parametrize("name", ["mnist", "fashion", "cifar10"])
    def test_a_tenth_is_held_out_and_nothing_is_lost(self, tmp_path, name):
        write_sets(tmp_path)
        data = read_images(name, tmp_path)
        total = 60 if name == "cifar10" else 40
        assert len(data.held_out) == total // 10
        assert len(data.train) == total - total // 10
        assert len(data.test) == 12
        both = torch.cat([data.train.images, data.held_out.images]).flatten(1)
        assert len(both.unique(dim=0)) == total
        again = read_images(name, tmp_path)
        torch.testing.assert_close(again.held_out.images, data.held_out.images)

    def test_a_missing_folder_says_what_was_looked_for(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="mnist in one of mnist, MNIST/raw"):
            read_images("mnist", tmp_path)


def smooth_images(count, channels, size):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, channels, size, size, generator=generator)
    return (nn.functional.avg_pool2d(noise, 5, 1, 2) * 255).to(torch.uint8)


class TestCorruptions:
    @pytest.mark.parametrize("name", CORRUPTIONS)
    @pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
    def test_shapes_bytes_seeds_and_identity(self, name, channels, size):
        images = smooth_images(3, channels, size)
        before = images.clone()
        for severity in (1, 5):
            found = corrupt(images, name, severity, seed=1)
            assert found.shape == images.shape
            assert found.dtype == torch.uint8
            assert not torch.equal(found, images)
            torch.testing.assert_close(found, corrupt(images, name, severity, seed=1))
        torch.testing.assert_close(corrupt(images, name, 0), images)
        torch.testing.assert_close(images, before)

    # Elastic severities are no ladder in the published constants.
    @pytest.mark.parametrize("name", sorted({*CORRUPTIONS} - {"elastic"}))
    def test_severity_grows(self, name):
        images = smooth_images(20, 3, 32)
        moved = [
            float((corrupt(images, name, severity).float() - images).square().mean())
            for severity in SEVERITIES
        ]
        assert moved == sorted(moved)

    def test_brightness_adds_to_the_value(self):
        grey = torch.tensor([0, 100, 250], dtype=torch.uint8).view(1, 1, 1, 3)
        found = corrupt(grey, "brightness", 5).flatten().tolist()
        assert found == [127, 227, 255]
        colour = torch.tensor([100, 50, 0], dtype=torch.uint8).view(1, 3, 1, 1)
        # The value goes from 100 to 176.5 of 255, hue and saturation stay.
        found = corrupt(colour, "brightness", 5).flatten().tolist()
        assert found == [176, 88, 0]

    def test_impulse_noise_hits_its_share(self):
        images = torch.full((50, 1, 28, 28), 100, dtype=torch.uint8)
        found = corrupt(images, "impulse noise", 5)
        n, share = found.numel(), 0.27
        # 4.3 standard errors: a false-alarm rate of 2e-5.
        error = 4.3 * (share * (1 - share) / n) ** 0.5
        assert abs(float((found != 100).double().mean()) - share) < error
        error = 4.3 * (share / 2 * (1 - share / 2) / n) ** 0.5
        assert abs(float((found == 255).double().mean()) - share / 2) < error

    def test_blur_keeps_a_flat_image(self):
        flat = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
        found = corrupt(flat, "gaussian blur", 5)
        assert int((found.int() - 77).abs().max()) <= 1

    def test_elastic_affine_part_keeps_a_plane(self):
        # A ramp under an affine map is a ramp, where the border does not enter.
        ramp = (torch.arange(32) * 4).to(torch.uint8).expand(1, 3, 32, 32).clone()
        found = corrupt(ramp, "elastic", 1).double()[0, 0, 12:20, 12:20]
        second = found.diff(n=2, dim=1)
        assert float(second.abs().max()) <= 2  # each step is cut to a byte


class TestNetworks:
    @pytest.mark.parametrize(
        ("architecture", "channels", "size", "expected"),
        [
            ("cnn", 1, 28, 29_994),
            ("conv-bn-5", 1, 28, 278_890),
            ("resnet9", 3, 32, 3_033_162),
            ("resnet18", 3, 32, 11_173_962),
        ],
    )
    def test_outputs_and_sizes(self, architecture, channels, size, expected):
        net = make_network(architecture, 0, channels=channels, dropout=0.2).eval()
        assert net(torch.rand(2, channels, size, size)).shape == (2, 10)
        assert num_params(net) == expected

    def test_training_lowers_the_loss_and_is_kept(self, tmp_path):
        write_sets(tmp_path)
        data = read_images("mnist", tmp_path)
        recipe = Recipe("cnn", 8, 0.05, batch_size=9)
        networks = Networks(tmp_path / "networks")
        state = torch.get_rng_state()
        net = networks.get(data, recipe, 3)
        torch.testing.assert_close(torch.get_rng_state(), state)
        assert not net.training
        x, y = to_unit(data.train.images), data.train.labels
        loss = nn.functional.cross_entropy
        with torch.no_grad():
            before = loss(make_network("cnn", 3000)(x), y)
            assert float(loss(net(x), y)) < float(before)
        (path,) = (tmp_path / "networks").iterdir()
        stamp = path.stat().st_mtime_ns
        again = networks.get(data, recipe, 3)
        assert path.stat().st_mtime_ns == stamp
        torch.testing.assert_close(again(x), net(x))

    @pytest.mark.parametrize("dropout", [0.0, 0.2])
    def test_a_run_that_was_killed_goes_on(self, tmp_path, dropout):
        """From the end of the last epoch: the same weights to the last digit."""
        write_sets(tmp_path)
        part = read_images("mnist", tmp_path).train
        recipe = Recipe("cnn", 4, 0.05, batch_size=9, augment="shift")
        path = tmp_path / "network.epoch"

        class Killed(Exception):
            pass

        def killed(module, inputs):
            if killed.left == 0:
                raise Killed
            killed.left -= 1

        def started():
            return make_network("cnn", 0, dropout=dropout)

        whole, begun, goes_on = started(), started(), started()
        fit(whole, part, recipe, 7, path)
        killed.left = 2 * (len(part) // 9) + 1  # in the third epoch
        begun.register_forward_pre_hook(killed)
        with pytest.raises(Killed, match=r"^$"):
            fit(begun, part, recipe, 7, path)
        assert path.exists()
        fit(goes_on, part, recipe, 7, path)
        assert not path.exists()
        torch.testing.assert_close(goes_on.state_dict(), whole.state_dict())

    def test_weight_decay_is_the_prior(self, tmp_path):
        # At the optimum of SGD with weight decay, the log joint density is flat.
        write_sets(tmp_path)
        data = read_images("mnist", tmp_path)
        recipe = Recipe("cnn", 1, 0.01, weight_decay=0.1, batch_size=36)
        assert recipe.prior_precision(data) == pytest.approx(3.6)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        fit(net, data.train, Recipe("cnn", 500, 0.02, 0.1, 36), 0)
        x, y = to_unit(data.train.images), data.train.labels
        nn.functional.cross_entropy(net(x), y, reduction="sum").backward()
        weight = net[1].weight.detach()
        slope = net[1].weight.grad + recipe.prior_precision(data) * weight
        assert float(slope.abs().max()) < 0.02

    def test_batches_pass_over_all_data(self):
        part = Part(torch.zeros(10, 1, 4, 4, dtype=torch.uint8), torch.arange(10))
        recipe = Recipe("cnn", 1, batch_size=4)
        seen = [y for _, y in batches(part, recipe, 0, 4)]
        assert [len(y) for y in seen] == [4] * 4
        assert len(torch.cat(seen[:2]).unique()) == 8

    def test_shifts_move_whole_images(self):
        image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
        image[0, 0, 4, 4] = 255
        part = Part(image.repeat(64, 1, 1, 1), torch.zeros(64, dtype=torch.int64))
        recipe = Recipe("cnn", 1, batch_size=64, augment="shift")
        ((x, _),) = batches(part, recipe, 0, 1)
        assert x.sum().item() == 64
        rows = x.flatten(1).argmax(1)
        assert set((rows // 9).tolist()) == {2, 3, 4, 5, 6}
        assert set((rows % 9).tolist()) == {2, 3, 4, 5, 6}

    def test_a_square_of_the_mean_colour_is_cut_out(self):
        """Of colour images of one colour each, into which shifts bring no other."""
        shade = torch.tensor([0, 255]).repeat(32).to(torch.uint8)
        images = shade[:, None, None, None].expand(64, 3, 20, 20)
        part = Part(images, shade.long())
        recipe = Recipe("cnn", 1, batch_size=64, augment="cut")
        ((x, y),) = batches(part, recipe, 0, 1)
        is_cut = x == 0.5
        own = (y / 255).view(-1, 1, 1, 1).expand_as(x)
        assert torch.equal(x[~is_cut], own[~is_cut])
        rows, columns = is_cut.any(3), is_cut.any(2)
        assert (rows.sum(2) == 8).all()
        assert (columns.sum(2) == 8).all()
        assert (is_cut.sum((2, 3)) == 64).all()
        # Anywhere: at each of 13 places about 5 of 64 squares begin.
        tops = rows[:, 0].int().argmax(1)
        assert set(tops.tolist()) == set(range(13))


class TestSwag:
    def test_draws_have_the_moments(self):
        generator = torch.Generator().manual_seed(0)
        deviations = torch.tensor([[1.0, -1.0, 0.0], [0.5, 0.5, 0.0]])
        variance = torch.tensor([1.0, 4.0, 0.0])
        found = Swag(torch.tensor([1.0, 2.0, 3.0]), variance, deviations)
        n, scale = 20_000, 0.5
        draws = torch.stack([found.draw(scale, generator) for _ in range(n)])
        # Algorithm 1: half the diagonal and half the low-rank covariance.
        wanted = 0.5 * (variance.diag() + deviations.T @ deviations / (2 - 1))
        # 4.3 standard errors of the largest entry, 1.0 after scaling.
        torch.testing.assert_close(
            draws.T.cov(), scale**2 * wanted, rtol=0, atol=4.3 * (2 / n) ** 0.5
        )
        torch.testing.assert_close(found.draw(0.0, generator), found.mean)

    def test_moments_as_a_selector_reads_them(self):
        variance = torch.tensor([0.5, 2.0, 0.0])
        found = Swag(torch.tensor([1.0, 2.0, 3.0]), variance, torch.zeros(2, 3))
        moments = found.moments()
        torch.testing.assert_close(moments.variance.float(), variance)
        torch.testing.assert_close(moments.mean.float(), found.mean)

    def test_steps_are_in_the_precision_of_training(self, tmp_path):
        """Iterates in bfloat16 are other ones, as close as its three digits are."""
        part = Part(smooth_images(256, 1, 28), torch.arange(256) % 10)
        net, found = make_network("cnn", 0), {}
        for half in (False, True):
            recipe = Recipe("cnn", 1, 0.1, bfloat16=half)
            path = tmp_path / f"{half}.safetensors"
            found[half] = swag(net, part, recipe, epochs=1, seed=0, path=path).mean
        start = nn.utils.parameters_to_vector(net.parameters()).detach()
        moved = (found[False] - start).norm()
        assert 0 < (found[True] - found[False]).norm() < 0.1 * moved

    def test_norms_are_fitted_to_new_weights(self):
        net = nn.Sequential(
            nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, affine=False)
        ).eval()
        images = smooth_images(8, 1, 4)
        part = Part(images, torch.zeros(8, dtype=torch.int64))
        before = net[1].running_mean.clone()
        other = with_weights(net, torch.tensor([1.0, 3.0]), part)
        mean = to_unit(images).mean()
        torch.testing.assert_close(other[1].running_mean, torch.stack([mean, 3 * mean]))
        torch.testing.assert_close(net[1].running_mean, before)


@dataclass(frozen=True)
class Second:
    """Networks whose first member is another's second."""

    networks: Networks

    @property
    def folder(self):
        return self.networks.folder / "second"

    def get(self, *args, member, **options):
        return self.networks.get(*args, member=member + 1, **options)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    write_sets(folder, num_train=60)
    settings = Settings(folder, folder / "out", "smoke", 1)
    setup = evaluation.setup_of("mnist", "smoke")
    data = read_images("mnist", folder)
    return evaluation.make_case(data, setup, settings, 0)


# Networks this small, on random pixels, are tuned to whichever bound.
@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.TuningWarning")
class TestMethods:
    def test_mixture_is_the_mean_of_probabilities(self):
        logs = [torch.randn(4, 3, dtype=torch.float64).log_softmax(1) for _ in range(5)]
        by_hand = sum(part.exp() for part in logs) / 5
        torch.testing.assert_close(mixture(logs).exp(), by_hand)

    @pytest.mark.parametrize("name", [*baselines.WITH_PRIOR, "VaLLA"])
    def test_posteriors_of_laplace_torch_spread(self, case, name):
        """Probabilities are wider than the MAP's, and tuned ones fit images better."""
        x = to_unit(case.data.test.images)
        at_map = methods.fit("MAP", case).predict(x).exp()
        own = name if name == "VaLLA" else f"{name}{OWN_PRIOR}"
        probs = methods.fit(own, case).predict(x).exp()
        total = probs.sum(1)
        # That library's own, in float32, are off by a few 1e-7.
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
        assert float((probs - at_map).abs().max()) > 1e-4
        entropy = lambda p: -(p * p.log()).sum(1).mean()  # noqa: E731
        assert float(entropy(probs)) > float(entropy(at_map))
        if name in baselines.WITH_PRIOR:
            tuned = methods.fit(name, case)
            x, y = case.tune[""]
            assert nll(tuned.predict, (x, y)) <= nll(
                methods.fit(own, case).predict, (x, y)
            )

    def test_a_fit_that_was_kept_counts_its_seconds(self, case):
        def seconds() -> float:
            scores = methods.fit(f"subnet LastLayer{OWN_PRIOR}", case).scores
            (found,) = (s.value for s in scores if s.metric == "seconds_fit")
            return found

        assert seconds() < 1000
        (clock,) = case.networks.folder.parent.glob("posteriors/*LastLayer*.seconds")
        assert 0 < float(clock.read_text()) < 1000
        clock.write_text("1000")
        assert 1000 <= seconds() < 2000

    def test_a_part_of_the_data_is_scaled_up_to_all(self, case):
        """By a temperature: the posterior of images thrice is that of a third."""
        few = case.data.train[:12]
        thrice = Part(few.images.repeat(3, 1, 1, 1), few.labels.repeat(3))
        networks = SimpleNamespace(get=lambda *args, **options: case.net())
        recipe = replace(case.setup.recipe, most=None, weight_decay=1e-3)
        setup = replace(case.setup, recipe=recipe, fitted=None)
        data = replace(case.data, train=thrice)
        all_of_it = replace(case, data=data, setup=setup, networks=networks)
        part = replace(all_of_it, setup=replace(setup, fitted=12))
        assert rivals.temperature(all_of_it) == 1.0
        assert rivals.temperature(part) == pytest.approx(1 / 3)
        x, y = to_unit(few.images), few.labels
        loader = DataLoader(TensorDataset(x, y), 12)
        by_hand = Laplace(
            copy.deepcopy(case.net()),
            "classification",
            prior_precision=rivals.own_precision(part),
            temperature=rivals.temperature(part),
            backend=CurvlinopsGGN,
        )
        by_hand.fit(loader)
        found = methods.fit(f"{baselines.WITH_PRIOR[1]}{OWN_PRIOR}", all_of_it)
        expected = by_hand(x, link_approx="probit").detach().double()
        torch.testing.assert_close(
            found.predict(x).exp(), expected, rtol=1e-3, atol=1e-5
        )

    def test_ensemble_by_hand(self, case):
        x = to_unit(case.data.test.images)
        found = methods.fit("deep ensemble", case).predict(x)
        with torch.no_grad():
            each = [case.net(member)(x).double().softmax(1) for member in (0, 1)]
        torch.testing.assert_close(found.exp(), (each[0] + each[1]) / 2)
        alone = methods.fit("MAP", case).predict(x)
        torch.testing.assert_close(alone.exp(), each[0])

    def test_dropout_averages_masked_passes(self, case):
        x = to_unit(case.data.test.images[:4])
        found = methods.fit("MC dropout", case)
        chosen = {each.metric: each.value for each in found.scores}
        net = case.net(dropout=chosen["rate"])
        for module in net.modules():
            if isinstance(module, nn.Dropout | nn.Dropout2d):
                module.train()
                module.p = chosen["scale"]
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(case.seed)
            passes = [net(x).double().softmax(1) for _ in range(case.setup.passes)]
        torch.testing.assert_close(found.predict(x).exp(), sum(passes) / len(passes))
        torch.testing.assert_close(found.predict(x), found.predict(x))

    def test_searches_have_as_many_values_as_that_of_the_prior_precision(self):
        assert len(baselines.TEMPERATURES) == len(baselines.swag_scales(45)) == 45
        assert len(baselines.DROPOUT_RATES) * len(baselines.DROPOUT_FACTORS) == 44
        assert min(baselines.TEMPERATURES) < 1 < max(baselines.TEMPERATURES)
        scales = baselines.swag_scales(45)
        assert scales[:2] == (0.0, 8.0)
        assert scales[-1] == pytest.approx(8 * 2**-7.2)

    @pytest.mark.parametrize(
        ("name", "members"),
        [("MAP with temperature", 1), ("deep ensemble with temperature", 2)],
    )
    def test_temperature_is_the_best_on_the_tuning_images(self, case, name, members):
        x, y = case.tune[""]
        found = methods.fit(name, case)
        with torch.no_grad():
            each = [case.net(k)(x).double().softmax(1) for k in range(members)]
        # Of the mixture, which at one member is the network itself.
        log_probs = (sum(each) / len(each)).log()
        losses = {
            t: float(nn.functional.cross_entropy(log_probs / t, y))
            for t in baselines.TEMPERATURES
        }
        best = min(losses, key=losses.__getitem__)
        assert found.scores[0].value == best
        expected = (log_probs / best).log_softmax(1)
        torch.testing.assert_close(found.predict(x), expected)

    def test_an_ensemble_mixes_the_posteriors_of_its_members(self, case):
        x = to_unit(case.data.test.images)
        name = "subnet PredictiveVariance"
        found = methods.fit("ensemble of subnets (PredictiveVariance)", case)
        alone = methods.fit(name, case).predict(x)
        others = methods.fit(name, replace(case, networks=Second(case.networks)))
        expected = mixture([alone, others.predict(x)])
        torch.testing.assert_close(found.predict(x), expected)
        assert float((expected - alone).abs().max()) > 1e-3

    @pytest.mark.parametrize("suffix", ["", ON_SHIFT])
    def test_a_tuned_prior_fits_its_images_better_than_the_own(self, case, suffix):
        name = "subnet RandomSubnet"
        own = methods.fit(f"{name}{OWN_PRIOR}", case)
        tuned = methods.fit(f"{name}{suffix}", case)
        assert {each.value for each in own.scores if each.metric == "scale"} == {1.0}
        images = case.tune[suffix]
        assert nll(tuned.predict, images) < nll(own.predict, images)

    def test_a_prior_within_errors_is_nearer_the_own(self, case):
        name = "subnet RandomSubnet"
        found, losses = {}, {}
        for suffix in ("", OWN_PRIOR, WITHIN_ERRORS):
            fitted = methods.fit(f"{name}{suffix}", case)
            (found[suffix],) = (s.value for s in fitted.scores if s.metric == "scale")
            losses[suffix] = nll(fitted.predict, case.tune[""])
        logs = {suffix: abs(math.log(scale)) for suffix, scale in found.items()}
        assert 0 == logs[OWN_PRIOR] <= logs[WITHIN_ERRORS] < logs[""]
        assert losses[""] < losses[WITHIN_ERRORS] <= losses[OWN_PRIOR]

    def test_the_default_is_that_of_the_library(self, case):
        """5% of the weights under the model's prior, or the one of highest evidence."""
        x = to_unit(case.data.test.images)
        net = case.net()
        precision = case.setup.recipe.prior_precision(case.data)
        part = case.fitted_part()
        guide = AutoSubnetLaplace(
            methods.classifier(net, precision),
            0.05,
            init_loc_fn=init_to_module(net),
        )
        weight = len(case.setup.recipe.training_part(case.data)) / len(part)
        posterior = guide.laplace_approximation_from(
            [(to_unit(part.images), part.labels)], num_data=round(weight * len(part))
        )
        for end, expected in (
            (OWN_PRIOR, posterior),
            (BY_EVIDENCE, posterior.tune_prior_precision()),
        ):
            found = methods.fit(f"{methods.DEFAULT}{end}", case)
            size = round(0.05 * num_params(net))
            assert size in {s.value for s in found.scores if s.metric == "S"}
            torch.testing.assert_close(
                found.predict(x).exp(),
                expected.predictive_distribution(x).probs.double(),
                rtol=1e-4,
                atol=1e-6,
            )

    def test_sizes_of_subnets(self, case):
        for name, size in (("S / 4", 5), ("5 S", 100)):
            found = methods.fit(f"subnet RandomSubnet, {name}", case)
            assert size in {each.value for each in found.scores if each.metric == "S"}

    def test_a_posterior_is_fitted_once_and_predicts_as_the_library(self, case):
        name = "subnet RandomSubnet"
        x = to_unit(case.data.test.images)
        found = methods.fit(name, case).predict(x)
        files = {
            path.name: path.stat().st_mtime_ns
            for path in case.file("posteriors", "x").parent.iterdir()
        }
        again = methods.fit(name, case).predict(x)
        torch.testing.assert_close(again, found)
        assert files == {
            path.name: path.stat().st_mtime_ns
            for path in case.file("posteriors", "x").parent.iterdir()
        }
        assert found.exp().sum(1).sub(1).abs().max() < 1e-9

    def test_scores_against_definitions(self, case):
        torch.manual_seed(0)
        images = smooth_images(6, 1, 28)
        labels = torch.tensor([0, 1, 2, 3, 4, 5])
        log_probs = torch.randn(6, 10, dtype=torch.float64).log_softmax(1)
        table = torch.cat([log_probs, log_probs[:2]])
        base = torch.rand(6, dtype=torch.float64)
        found = evaluation.score(
            lambda x: table[: len(x)],
            [("", Part(images, labels))],
            {"other": images[:2]},
            [base],
        )
        by_name = {(each.shift, each.metric): each.value for each in found}
        picked = [float(log_probs[n, n]) for n in range(6)]
        assert by_name["", "nll"] == pytest.approx(-sum(picked) / 6)
        one_hot = torch.eye(10, dtype=torch.float64)[:6]
        brier = float((log_probs.exp() - one_hot).square().sum(1).mean())
        assert by_name["", "brier"] == pytest.approx(brier)
        wrong = sum(int(log_probs[n].argmax()) != n for n in range(6)) / 6
        assert by_name["", "error"] == pytest.approx(wrong)
        entropy = -(log_probs.exp() * log_probs).sum(1)
        pairs = [
            (float(b > a) + 0.5 * float(b == a)) for a in entropy for b in entropy[:2]
        ]
        own = torch.tensor([-value for value in picked])
        for name, values in [("nll_error", own), ("gain_error", base - own)]:
            error = float(values.var().div(6).sqrt())
            assert by_name["", name] == pytest.approx(error)
        assert by_name["ood=other", "auroc"] == pytest.approx(sum(pairs) / 12)


class TestExperiments:
    def test_rotation_by_a_quarter_turn(self):
        images = smooth_images(2, 1, 28)
        found = evaluation.rotated(images, 90)
        assert int((found.int() - images.rot90(1, (2, 3)).int()).abs().max()) <= 1

    def test_tasks_are_unique_and_cost_nothing(self, tmp_path):
        settings = Settings(None, tmp_path, "small", 3)
        made = [
            task
            for module in (rotated, corrupted, fashion, cifar10, resnet18)
            for task in module.tasks(settings)
        ]
        assert len({task.name for task in made}) == len(made) == 18
        assert not list(tmp_path.iterdir())
        for task in made:
            assert len(set(task.methods)) == len(task.methods)
            if task.experiment != fashion.NAME:
                for end in (OWN_PRIOR, WITHIN_ERRORS, BY_EVIDENCE, ON_SHIFT):
                    assert f"subnet LastLayer{end}" in task.methods

    def test_a_picture_has_a_panel_for_each_way_of_tuning(self, tmp_path):
        points = [(0.0, 1.0, 0.1), (1.0, 2.0, 0.1)]
        found = {"MAP": points, "subnet LastLayer": points}
        widths = []
        for end in (OWN_PRIOR, ON_SHIFT, ""):
            path = tmp_path / "found.png"
            text = reporting.picture(found, path, "size")
            assert text == "![NLL of each method by size](found.png)"
            widths.append(imread(path).shape[1])
            found[f"subnet LastLayer{end}"] = points
        assert widths == [160 * (1 + 4.2 * count) // 1 for count in (1, 2, 3)]

    @pytest.mark.slow
    def test_a_run_and_its_report(self, tmp_path):
        write_sets(tmp_path, num_train=60)
        settings = Settings(tmp_path, tmp_path / "out", "smoke", 1)
        chosen = ("MAP", "subnet LargestVariance")
        most = {module.NAME: EXPERIMENTS[module.NAME] for module in (rotated, fashion)}
        most |= {cifar10.NAME: EXPERIMENTS[cifar10.NAME]}
        assert run(most, settings, Only(chosen)) == []
        last = {each.NAME: EXPERIMENTS[each.NAME] for each in (corrupted, resnet18)}
        assert run(last, settings, Only(("MAP",))) == []
        for module, title in (
            (rotated, "mnist, upright and turned"),
            (cifar10, "CIFAR-10"),
        ):
            rows = read(settings.out / f"{module.NAME}.jsonl")
            text = module.report(rows, settings.out)
            assert title in text
            assert "| subnet LargestVariance |" in text
        assert (settings.out / "rotated-mnist.png").stat().st_size > 1000

    def test_means_and_errors_over_seeds(self):
        rows = [
            {
                "method": "MAP",
                "metric": "nll",
                "shift": f"x={s}",
                "seed": seed,
                "value": 10.0 * seed + s,
            }
            for seed in range(3)
            for s in (1, 3)
        ]
        column = reporting.Column("x=*", "nll")
        assert reporting.by_seed(rows, "MAP", column) == [2, 12, 22]
        other = [row | {"method": "SWAG", "value": row["value"] - 1} for row in rows]
        column = reporting.Column("x=*", "nll", to_map=True)
        found = reporting.by_seed([*rows, *other[2:]], "SWAG", column)
        assert found == [-1, -1]  # of the seeds that both have
        text = reporting.table("T", [reporting.Column("x=*", "nll")], [*rows, *other])
        # Standard deviation 10 over the root of 3.
        assert "| MAP | 12.00 ± 5.77 |" in text

    def test_gain_beside_a_temperature_of_the_same_price(self):
        """Of a curve that first helps and then costs: price (t - 1)^2 - 0.1, gain t."""

        def row(method, metric, shift, value):
            return {
                "method": method,
                "metric": metric,
                "shift": shift,
                "seed": 0,
                "value": value,
            }

        rows = [row("MAP", "nll", shift, value) for shift, value in [("", 1), ("s", 9)]]
        for t in CURVE:
            name = at_temperature(t)
            rows.append(row("MAP", name, "", 1 + (t - 1) ** 2 - 0.1))
            rows.append(row("MAP", name, "s", 9 - t))
        column = reporting.Column("s", "nll", to_temperature=True)
        for price, shifted, expected in [
            (0.5, 7.0, 7.0 - (9 - (1 + 0.6**0.5))),
            (-0.2, 7.0, 7.0 - 8.0),  # better in distribution than any temperature
            (99.0, 7.0, 7.0 - (9 - CURVE[-1])),
        ]:
            own = [row("SWAG", "nll", "", 1 + price), row("SWAG", "nll", "s", shifted)]
            (found,) = reporting.by_seed([*rows, *own], "SWAG", column)
            assert found == pytest.approx(expected, abs=0.01)
        assert reporting.by_seed(rows[:2], "MAP", column) == []

    def test_errors_of_one_seed_are_those_over_images(self):
        values = {"nll": 0.5, "nll_error": 0.02, "gain_error": 0.01}
        rows = [
            {"method": name, "metric": metric, "shift": "", "seed": 0, "value": value}
            for name in ("MAP", "SWAG")
            for metric, value in values.items()
        ]
        assert reporting.cell(rows, "SWAG", reporting.Column("", "nll")) == (
            "0.500 ± 0.020"
        )
        to_map = reporting.Column("", "nll", to_map=True)
        assert reporting.cell(rows, "SWAG", to_map) == "0.000 ± 0.010"

    def test_published_figures_stand_beside_ours(self):
        """Each severity by itself, under the prior of the MAP where that was run."""
        kinds = {"dataset": "cifar10", "variant": "net", "metric": "nll"}
        values = {
            ("MAP", ""): 0.3,
            ("subnet LastLayer", ""): 0.2,
            (f"subnet LastLayer{OWN_PRIOR}", ""): 0.25,
            ("MAP", "elastic=2"): 0.5,
        }
        rows = [
            {**kinds, "method": method, "shift": shift, "seed": seed, "value": value}
            for (method, shift), value in values.items()
            for seed in range(2)
        ]
        lines = published.report({"cifar10": rows}).splitlines()
        own = "| CIFAR-10 | 0.289 | - | net | 2 | 0.300 ± 0.000 | - | - | - |"
        assert f"{own} 0.250 ± 0.000 |" in lines
        elastic = [line for line in lines if "elastic" in line]
        assert len(elastic) == len(SEVERITIES)
        assert "| 2 | net | 2 | 0.500 ± 0.000 | - | - | - | - |" in elastic[1]
        assert "| ImageNet-10 | 0.277 | - | not run: no data | - |" in "\n".join(lines)
        assert "| FashionMNIST | 0.286 | - | not run | - |" in "\n".join(lines)

    def test_sets_side_by_side(self):
        first = [
            {"method": "MAP", "metric": "nll", "shift": "", "seed": s, "value": 1.0}
            for s in range(2)
        ]
        second = [row | {"value": 2.0} for row in first[:1]]
        first += [first[0] | {"method": "SWAG", "value": 3.0}]
        columns = [reporting.Column("", "nll")]
        text = reporting.side_by_side(
            "T",
            [
                reporting.Block("a:", columns, first),
                reporting.Block("b:", columns, second),
            ],
        )
        assert "| method | a: nll | b: nll |" in text
        assert "| MAP | 1.000 ± 0.000 | 2 |" in text
        assert "| SWAG (0, 1 of 2 seeds) | 3 | - |" in text

    def test_tables_by_how_methods_are_tuned(self):
        subnet, ensemble = "subnet RandomSubnet", "deep ensemble"
        alone = ["MAP", ensemble]
        ends = ("", OWN_PRIOR, WITHIN_ERRORS)
        methods = [*alone, *(f"{subnet}{end}" for end in ends)]
        assert reporting.groups(methods) == {
            "": [*alone, subnet],
            ", prior of the MAP": [*alone, f"{subnet}{OWN_PRIOR}"],
            ", prior of the MAP within two errors": [
                *alone,
                f"{subnet}{WITHIN_ERRORS}",
            ],
        }
        by_size = [f"{subnet}{ON_SHIFT}", f"{subnet}, 5 S{ON_SHIFT}"]
        assert reporting.groups(["MAP", *by_size]) == {
            ON_SHIFT: ["MAP", by_size[0]],
            f"{ON_SHIFT}, by size": ["MAP", *by_size],
        }
