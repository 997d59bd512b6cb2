"""Tests of everything: contracts, known answers, behaviour, end to end. CPU, offline: pytest test_smoke.py

Each docstring names the bug that the test would catch. What needs real footage looks for it in ../shared/data and is
skipped where that is absent.
"""
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import fvd
import generative_nerv
import nerv_dit
import nerv_vae
import sample

torch.set_num_threads(1)        # tensors here are tiny, and threads that wait for each other on a busy machine are slow
HERE = Path(__file__).parent
FOOTAGE = HERE.parent / "shared" / "data"
TINY = dict(model="8", tokens=6, token_dim=8, gen_channels=4, enc_depth=1, enc_heads=2, enc_dim=24, frames=4,
            resolution=32, batch=4, steps=2, eval_every=2, log_every=1, warmup=1)
TINY_DIT = dict(depth=2, heads=2, dim=32, batch=8, steps=2, eval_every=2, log_every=1, warmup=1, sample_steps=3)


def flags(settings):
    """{"eval_every": 2, "flip": True} -> ["--eval-every", "2", "--flip"]."""
    words = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def tiny(**changes):
    return nerv_vae.Config(**{**TINY, **changes})


@pytest.fixture(autouse=True, scope="module")
def few_toy_videos():
    """A token cache of 96 clips is made in no time."""
    data.TOY_VIDEOS = 96


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Both stages trained for two steps through their command lines, the second on the first's checkpoint."""
    out = tmp_path_factory.mktemp("run")
    vae = nerv_vae.main(["--out", f"{out}/vae", *flags(TINY)])
    dit = nerv_dit.main(["--vae", str(vae), "--out", f"{out}/dit", *flags(TINY_DIT)])
    return SimpleNamespace(out=out, vae=vae, dit=dit)


# ---------------------------------------------------------------------------------------------- contracts

def test_shapes_and_ranges_are_as_documented():
    """Catches a swapped axis or a lost tanh anywhere between pixels, tokens and pixels."""
    cfg = tiny()
    model, video = nerv_vae.NeRVVAE(cfg), torch.rand(3, 4, 3, 32, 32) * 2 - 1
    mean, logvar = model.encode(video)
    assert mean.shape == logvar.shape == (3, cfg.tokens, cfg.token_dim)
    recon = model.decode(mean, torch.tensor([0.0, 2.5, 9.0]))                       # a subset, fractional, beyond
    assert recon.shape == (3, 3, 3, 32, 32) and recon.abs().max() <= 1
    assert nerv_vae.Discriminator(cfg)(video.transpose(1, 2)).shape == (3,)
    assert generative_nerv.positional_embedding(torch.arange(5.0), 8, 16, 10.0).shape == (5, 48, 8, 8)
    dit = nerv_dit.DiT(nerv_dit.Config(**TINY_DIT), 6, 8, classes=5)
    assert dit(mean, torch.tensor([0, 5, 999]), torch.tensor([0, 4, 5])).shape == mean.shape


def test_frames_decode_independently():
    """Catches time mixed up with the batch: a frame must not depend on which other frames are asked for."""
    model, z = generative_nerv.GenerativeNeRV(tiny()), torch.randn(2, 6, 8)
    whole = model(z, torch.arange(4.0))
    torch.testing.assert_close(model(z, torch.tensor([3.0, 1.0])), whole[:, [3, 1]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(z.flip(0), torch.arange(4.0)), whole.flip(0), rtol=1e-4, atol=1e-5)


def test_cells_are_told_apart():
    """Catches time, height and width that change places, and cells that look alike, as at 1 radian a cell."""
    place, sign = generative_nerv.positional_embedding(torch.tensor([0.0, 0.5]), 8, 16, 10.0), (-1.0) ** torch.arange(8)
    torch.testing.assert_close(place[1, 0], torch.full((8, 8), math.sin(0.5)))      # time: 1 radian a frame
    torch.testing.assert_close(place[0, 24], sign[:, None].expand(8, 8))            # height: half a turn a cell
    torch.testing.assert_close(place[1, 40], sign.expand(8, 8))
    for axis in (place[0, 16:32, :, 3], place[0, 32:, 3]):                          # (16, 8): full rank, by far
        assert (spread := torch.linalg.svdvals(axis))[7] > 0.4 * spread[0]


def test_queries_are_the_last_tokens():
    """Catches outputs taken from the patches: without the first N outputs being queries, queries would not matter."""
    encoder, video = nerv_vae.NeRVEncoder(tiny()).eval(), torch.rand(2, 4, 3, 32, 32)
    encoder.blocks = torch.nn.ModuleList()                                          # identity: outputs are inputs
    mean, _ = encoder(video)
    expected = encoder.bottleneck(encoder.norm(encoder.queries))[:, :8]
    torch.testing.assert_close(mean, expected.expand(2, -1, -1))


def test_config_becomes_a_command_line(capsys):
    """Catches a doubled default, a bool that cannot be switched off, a preset that beats a flag, a wrong exit code."""
    parse = lambda *words: data.parse_config(nerv_vae.Config, nerv_vae.PRESETS, list(words))
    assert parse() == nerv_vae.Config()
    assert parse("--dataset", "ucf").tokens == 128 and parse("--dataset", "ucf256").tokens == 160
    cfg = parse("--dataset", "ucf", "--no-bf16", "--lr", "1", "--tokens", "3")
    assert (cfg.bf16, cfg.lr, cfg.tokens) == (False, 1.0, 3)
    for words in (["--nonsense"], ["--tokens", "x"], ["--upsample", "magic"], ["--dataset", "nope"]):
        with pytest.raises(SystemExit) as stop:
            parse(*words)
        assert stop.value.code == 2 and "usage" in capsys.readouterr().err
    for module, presets in ((nerv_vae, nerv_vae.PRESETS), (nerv_dit, nerv_dit.PRESETS), (sample, {})):
        with pytest.raises(SystemExit) as stop:
            data.parse_config(module.Config, presets, ["--help"])
        assert stop.value.code == 0 and "(default:" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- known answers: decoder

@pytest.mark.parametrize("model, resolution, kernels", [("S", 128, 3.519e6), ("B", 128, 13.953e6), ("L", 128, 55.561e6),
                                                        ("L", 256, 64.474e6)])
def test_parameter_counts_are_the_papers(model, resolution, kernels):
    """Catches a block too many, a wrong width or a widening in the wrong place (paper: 3.5M, 14M, 55M, 64.5M)."""
    cfg = nerv_vae.Config(**{**nerv_vae.PAPER, "model": model, "resolution": resolution})
    with torch.device("meta"):
        net = generative_nerv.GenerativeNeRV(cfg)
    assert abs(sum(conv.shared.numel() for conv in net.convs) - kernels) < 600


def test_other_parameter_counts():
    """Catches a changed transformer or critic: DiT-L 457.1M, encoder 177.6M, discriminator 15.3M at 16 x 128 x 128."""
    cfg = nerv_vae.Config(**nerv_vae.PAPER)
    count = lambda net: sum(p.numel() for p in net.parameters()) / 1e6
    with torch.device("meta"):
        dit = nerv_dit.DiT(nerv_dit.Config(**nerv_dit.PAPER), 128, 128, 101)
        encoder, critic = nerv_vae.NeRVEncoder(cfg), nerv_vae.Discriminator(cfg)
        assert abs(count(dit) - dit.which.numel() / 1e6 - 457.1) < 0.1
        assert abs(count(critic) - 15.3) < 0.1
    heads = encoder.place.numel() / 1e6                                             # positions are fixed here
    assert abs(count(encoder) + heads - 177.6) < 0.5


REPEAT = dict(parameterization="repeat")
VARIANTS = [{}, dict(parameterization="fmm"), *[dict(expand=e, **REPEAT) for e in ("in", "out", "taps")],
            *[dict(reuse=r) for r in ("none", "direct")], *[dict(upsample=u) for u in ("pixelshuffle", "bilinear")],
            *[dict(side=s) for s in ("skip", "none")], *[dict(pe_size=s) for s in (1, 4, 16)], dict(normalize=False),
            dict(conv_init=False, **REPEAT), dict(model="6", gen_channels=16), dict(tokens=23, token_dim=5),
            dict(tokens=128, token_dim=8), *[dict(degrade=d) for d in ("downsample", "blur", "inpaint")]]


@pytest.mark.parametrize("change", VARIANTS, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "default")
def test_every_tokenizer_variant(change):
    """Catches a variant whose plain CNN differs, that starts dead or exploding, or that leaves parameters untrained."""
    torch.manual_seed(0)
    cfg = tiny(**{"model": "24", "gen_channels": 8, "tokens": 20, **change})
    model, video = nerv_vae.NeRVVAE(cfg), torch.rand(3, 4, 3, 32, 32) * 2 - 1
    net, z, frame, maps = model.decoder, torch.randn(3, cfg.tokens, cfg.token_dim), torch.tensor([0., 1.5, 9.]), []
    for conv in net.convs if cfg.parameterization == "channel" and cfg.normalize else []:
        conv.assemble = False                           # the form that real widths use
    for conv in net.convs:
        conv.register_forward_hook(lambda m, i, out: maps.append(out.square().mean().sqrt().item()))
    sample = net(z, frame)
    assert 0.2 < min(maps) and max(maps) < 3.5
    for b in range(3):                                  # a group order or an offset gone wrong shows here
        torch.testing.assert_close(net.instantiate(z[b])(frame), sample[b], rtol=1e-3, atol=1e-4)
    recon, mean, logvar = model(data.degrade(video, cfg.degrade), torch.arange(4.0), torch.randn_like(z))
    loss = F.mse_loss(recon, video) + 1e-5 * nerv_vae.kl_divergence(mean, logvar).sum()
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("mode", ["fmm", "repeat"])
def test_multiplied_kernels_start_alike(mode):
    """Catches a gain other than 1 +- 0.3: products of two small factors are smaller still."""
    torch.manual_seed(0)
    cfg = tiny(parameterization=mode, normalize=False, conv_init=False, model="24", tokens=20)
    net, z = generative_nerv.GenerativeNeRV(cfg), torch.randn(32, 20, 8)
    for conv in net.convs:                              # without conv_init, no shared number is near 0
        gain = conv.kernel(z) / conv.shared
        assert 0.2 < gain.std() / gain.mean() < 0.4


def test_nerv_enc_preset_fits_its_kernels():
    """Catches layers that read other layers' tokens, or other sizes than the appendix's: 4x256, 128x144, 64x288, 0."""
    torch.manual_seed(0)
    cfg = nerv_vae.Config(**{**nerv_vae.NERV_ENC, "enc_depth": 0})
    net, maps = generative_nerv.GenerativeNeRV(cfg), []
    assert [conv.numel for conv in net.convs if conv.head] == [4 * 256, 128 * 144, 64 * 288] and not net.convs[3].head
    assert net.used.sum() == 37_888 and [conv.shared.shape[1] for conv in net.convs] == [16, 16, 32, 16]
    for conv in net.convs:
        conv.register_forward_hook(lambda m, i, out: maps.append(out.square().mean().sqrt().item()))
    z, frame = torch.randn(2, cfg.tokens, cfg.token_dim), torch.tensor([0.5])
    video = net(z, frame)
    assert video.shape == (2, 1, 3, 256, 256) and 0.2 < min(maps) and max(maps) < 3
    torch.testing.assert_close(net.instantiate(z[1])(frame), video[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(net(torch.where(net.used, z, 9.0), frame), video)    # unread, so without effect
    video.mean().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_repeated_numbers_fill_the_side_they_should():
    """Catches numbers repeated along another side than asked for (NeRV-Enc B c), or added, not multiplied."""
    layer = generative_nerv.Layer("conv", 8, 12, 3, 8, 0, 0, 0)
    for axis, expand in enumerate(("out", "in", "taps")):
        conv = generative_nerv.ModulatedConv2d(layer, tiny(expand=expand, normalize=False, **REPEAT), slice(0, 6), 8)
        ratio = (conv.kernel(torch.randn(2, 6, 8)) / conv.kernel(torch.zeros(2, 6, 8))).flatten(3)  # (2, 12, 8, 9)
        runs = [ratio.unfold(a + 1, 4, 4).flatten(0, -2) for a in range(3)]         # four neighbours along each side
        assert [bool((run - run[:, :1]).abs().max() < 1e-4) for run in runs] == [a == axis for a in range(3)]


@pytest.mark.parametrize("backbone", ["dit", "gpt", "latte"])
@pytest.mark.parametrize("condition", ["class", "frames"])
def test_every_denoiser_trains_everywhere(backbone, condition):
    """Catches a layer that the loss does not reach. Rows of classes that are not in the batch get none, rightly."""
    torch.manual_seed(0)
    model = nerv_dit.DiT(nerv_dit.Config(**TINY_DIT, backbone=backbone, condition=condition), 6, 8, classes=3)
    for p in model.parameters():                        # gates start at zero, on purpose; open them
        torch.nn.init.normal_(p, std=0.2)
    tokens, noise, t = torch.randn(4, 6, 8), torch.randn(2, 4, 6, 8), torch.tensor([1, 9, 400, 999])
    cond = torch.tensor([0, 1, 2, 3]) if condition == "class" else torch.randn(4, 6, 8)
    loss = nerv_dit.diffusion_loss(model, tokens, noise, t, cond, nerv_dit.noise_schedule(), 5.0, own_step=1)
    loss.backward()
    unused = {"final_adaln.weight", "final_adaln.bias"} if backbone == "gpt" else set()             # it has no adaLN
    assert {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()} == unused


@pytest.mark.parametrize("assemble", [False, True])
@pytest.mark.parametrize("kind", ["conv", "transposed", "bilinear", "rgb"])
def test_factored_convolution_is_a_loop_over_videos(kind, assemble):
    """Catches wrong groups, a block at the wrong channels, a norm over the wrong axes: compare with plain loops."""
    torch.manual_seed(0)
    T, B, c_in, c_out, go, gi, k = 2, 3, 6, 10, 4, 2, 4 if kind == "transposed" else 3
    layer = generative_nerv.Layer(kind, c_in, c_out, k, 8, go, gi, 0)
    conv = generative_nerv.ModulatedConv2d(layer, tiny(), slice(0, 6), 8)
    x, z, conv.assemble = torch.randn(T * B, c_in, 8, 8), torch.randn(B, 6, 8), assemble
    with torch.no_grad():
        conv.bias.normal_()
        out = conv(x, z).view(T, B, c_out, *(8 if kind in ("conv", "rgb") else 16,) * 2)
        for b in range(B):
            kernel = conv.shared.clone()
            numbers = [conv.scale * value for token in z[b] for value in conv.head.weight @ token]
            for n in range(go * gi * k * k):                                                # the slow, certain way
                o, i, row, col = np.unravel_index(n, (go, gi, k, k))
                kernel[o, i, row, col] += numbers[n]
            for o in range(c_out):
                kernel[o] /= kernel[o].norm()
            for t in range(T):
                frame = x[t * B + b][None]
                if kind == "transposed":
                    expected = F.conv_transpose2d(frame, kernel.transpose(0, 1), stride=2, padding=1)[0]
                elif kind == "bilinear":
                    expected = F.conv2d(F.interpolate(frame, scale_factor=2, mode="bilinear"), kernel, padding=1)[0]
                else:
                    expected = F.conv2d(frame, kernel, padding=1)[0]
                expected = expected * conv.gain + conv.bias[:, None, None]
                torch.testing.assert_close(out[t, b], expected, rtol=1e-3, atol=1e-4)


def test_bilinear_by_matrices_is_interpolation():
    """Catches a wrong weight at an edge and two sides mixed up, in the form that only a GPU takes."""
    x = torch.randn(2, 3, 5, 4)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(generative_nerv.bilinear_by_matrices(x), expected)


@pytest.mark.parametrize("assemble", [False, True])
def test_autocast_reaches_the_whole_decoder(assemble):
    """Catches a float32 scale, bias or sum that makes feature maps float32 again: slower, and twice the memory."""
    torch.manual_seed(0)
    decoder, z, frame = generative_nerv.GenerativeNeRV(tiny()), torch.randn(2, 6, 8), torch.arange(3.0)
    for conv in decoder.convs:
        conv.assemble = assemble
    plain = decoder.instantiate(z[0])
    for net, run in ((decoder, lambda: decoder(z, frame)[0]), (plain, lambda: plain(frame))):
        types = []
        with torch.no_grad():
            exact = run()
            for conv in net.convs:
                conv.register_forward_hook(lambda _, inputs, y: types.extend([inputs[0].dtype, y.dtype]))
            with torch.autocast("cpu", torch.bfloat16):
                out = run()
        assert types[1:] == [torch.bfloat16] * (2 * len(net.convs) - 1)             # 0: the sinusoids
        assert (out - exact).square().mean() < 0.05 ** 2 * exact.square().mean()


def test_interpolated_tokens_are_interpolated_kernels():
    """Catches a non-linear step between tokens and kernels, which would break weight interpolation (Sec. 4.5.2)."""
    conv, a, b = generative_nerv.GenerativeNeRV(tiny()).convs[3], torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    torch.testing.assert_close(conv.generated(0.3 * a + 0.7 * b), 0.3 * conv.generated(a) + 0.7 * conv.generated(b))


# ---------------------------------------------------------------------------------------------- known answers: losses

def test_edge_error_of_a_slope(tmp_path):
    """Catches a direction left out, a brightness that counts, and a term that is logged but not trained on."""
    down, across = torch.meshgrid(torch.arange(6.0), torch.arange(5.0), indexing="ij")
    target = torch.randn(2, 4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    recon = target + 0.3 * down - 0.1 * across + 7                                  # (B, k, 3, H, W)
    assert nerv_vae.edge_error(recon, target).item() == pytest.approx(0.3 ** 2 + 0.1 ** 2, rel=1e-4)
    nerv_vae.main(["--out", str(tmp_path), *flags({**TINY, "steps": 1, "edge_weight": 2.0, "kl_weight": 0.01})])
    row = json.loads((tmp_path / "log.jsonl").read_text())
    numbers = TINY["tokens"] * TINY["token_dim"]
    assert row["edge"] > 0
    assert row["loss"] == pytest.approx(row["mse"] + 2 * row["edge"] + 0.01 * numbers * row["kl_per_dim"], rel=1e-5)


def test_kl_matches_torch():
    """Catches a lost half or a swapped sign in the KL term."""
    mean, logvar = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0., 1.))
    torch.testing.assert_close(nerv_vae.kl_divergence(mean, logvar), expected)
    assert nerv_vae.psnr_from_mse(0.2 ** 2) == pytest.approx(20.0)                  # 0.1 of a range of 1, range 2 here


def test_min_snr_weight():
    """Catches the weight of a data prediction used on a noise prediction (paper A.1: adjusted)."""
    snr = torch.tensor([1e-4, 1.0, 5.0, 10.0, 1000.0])
    torch.testing.assert_close(nerv_dit.min_snr_weight(snr, 5.0), torch.tensor([1.0, 1.0, 1.0, 0.5, 0.005]))
    assert (nerv_dit.min_snr_weight(snr, 0.0) == 1).all()


class OnePoint:
    """The exact denoiser of a data set with a single point, and of its mirror image for label 1."""

    by_tokens, classes, token_mean, token_std = False, 2, 0.0, 1.0

    def __init__(self, point):
        self.point, (self.alpha, self.sigma) = point, nerv_dit.noise_schedule()

    def __call__(self, z, t, cond):
        sign = torch.where(cond == 1, -1.0, 1.0)[:, None, None]
        return (z - self.alpha[t][:, None, None] * self.point * sign) / self.sigma[t][:, None, None]


@pytest.mark.parametrize("sampler, steps", [("ddpm", 250), ("ddpm", 3), ("ddim", 50), ("ddim", 1)])
def test_samplers_find_the_known_point(sampler, steps):
    """Catches a flipped time axis, an off-by-one step or a wrong posterior: with one data point the noise is known."""
    point = torch.randn(1, 4, 8)
    found = nerv_dit.sample_tokens(OnePoint(point), torch.tensor([0, 1, 1]), torch.randn(3, 4, 8), sampler, steps)
    torch.testing.assert_close(found, torch.cat([point, -point, -point]), rtol=1e-3, atol=1e-3)


def test_a_video_does_not_depend_on_its_batch():
    """Catches noise drawn for a batch as a whole, and fresh noise that repeats the noise a video started from."""
    model, noise = OnePoint(torch.zeros(1, 4, 8)), sample.noise_for(0, 3, (4, 8), seed=0)
    walk = lambda first, last: nerv_dit.sample_tokens(model, torch.zeros(last - first), noise[first:last], "ddpm", 10,
                                                      seed=first)
    model.sigma = model.sigma * 2                       # a denoiser that is wrong, so that noise stays
    torch.testing.assert_close(walk(0, 3), torch.cat([walk(0, 1), walk(1, 3)]))
    fresh = torch.randn(4, 8, generator=torch.Generator().manual_seed(2 ** 31))
    assert (fresh - noise).abs().amax((1, 2)).min() > 0.1


def test_loss_is_zero_for_the_exact_denoiser_and_in_both_passes():
    """Catches a loss and a sampler that disagree on time, and a second pass whose target forgets the true tokens."""
    point, schedule = torch.randn(1, 4, 8), nerv_dit.noise_schedule()
    t, tokens = torch.tensor([1, 300, 999]), point.expand(3, -1, -1)
    for own_step in (0, 1):
        noise = torch.randn(2, 3, 4, 8)
        loss = nerv_dit.diffusion_loss(OnePoint(point), tokens, noise, t, torch.zeros(3), schedule, 5.0, own_step)
        assert loss < 1e-6
    early, late = (nerv_dit.noise_schedule()[0][i] for i in (0, 999))
    assert early > 0.99 and late < 0.01                                             # 0 is almost data, 999 almost noise


def test_ancestral_step_has_the_posterior_of_gaussians():
    """Catches a wrong mean or variance: z_now, z_then are jointly Gaussian given the data, so Bayes' rule is exact."""
    alpha, sigma = (c.double() for c in nerv_dit.noise_schedule())
    now, then, data_point, z = 400, 380, 0.7, torch.tensor(0.3, dtype=torch.float64)
    ratio = alpha[now] / alpha[then]
    noise_between = sigma[now] ** 2 - ratio ** 2 * sigma[then] ** 2
    precision = 1 / sigma[then] ** 2 + ratio ** 2 / noise_between
    mean = (alpha[then] * data_point / sigma[then] ** 2 + ratio * z / noise_between) / precision
    eps = (z - alpha[now] * data_point) / sigma[now]
    pairs = [(alpha[i], sigma[i]) for i in (now, then)]
    got = nerv_dit.ancestral_step(z, eps, *pairs, torch.tensor(0.0))
    spread = nerv_dit.ancestral_step(z, eps, *pairs, torch.tensor(1.0)) - got
    torch.testing.assert_close(got, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(spread, precision ** -0.5, rtol=1e-5, atol=1e-6)


def test_guidance_acts_on_all_channels():
    """Catches DiT's known slip, guidance on the first channels only, and a swapped sign."""
    point = torch.ones(1, 2, 8)

    class Ask(OnePoint):                                # label 0 pulls to +1, label 2 (none) pulls to 0
        def __call__(self, z, t, cond):
            pull = torch.where(cond == 0, 1.0, 0.0)[:, None, None] * self.point
            return (z - self.alpha[t][:, None, None] * pull) / self.sigma[t][:, None, None]

    got = nerv_dit.sample_tokens(Ask(point), torch.tensor([0]), torch.randn(1, 2, 8), "ddim", 20, guidance=3.0)
    torch.testing.assert_close(got, 3 * point, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------- data

@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two classes of little videos in several containers, whose frame k has grey level 8 k; and some bad files."""
    root = tmp_path_factory.mktemp("videos")
    for n, (name, kind) in enumerate([("a/v_A_g01_c01", "avi"), ("a/v_A_g09_c01", "mp4"), ("b/deep/v_B_g02_c01", "mkv"),
                                      ("b/deep/v_B_g10_c01", "mov"), ("b/deep/one", "gif")]):
        path = root / f"{name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = np.stack([np.full((48, 64, 3), 8 * k, np.uint8) for k in range(20)])
        if kind == "gif":
            iio.imwrite(path, frames, duration=40, loop=0)
        else:
            codec = "mpeg4" if kind == "avi" else "libx264"
            iio.imwrite(path, frames, plugin="pyav", codec=codec, fps=25, in_pixel_format="rgb24")
    whole = (root / "a/v_A_g01_c01.avi").read_bytes()
    (root / "a/empty.mp4").write_bytes(b"")
    (root / "a/text.avi").write_text("not a video")
    (root / "a/cut.avi").write_bytes(whole[:len(whole) // 3])
    return root


def folder_config(tree, tmp_path, **changes):
    return tiny(**{**dict(dataset="folder", data_root=str(tree), out=str(tmp_path)), **changes})


def test_frame_k_is_frame_k(tree):
    """Catches a seek that lands beside the frame asked for, in every container."""
    for path in sorted(tree.rglob("v_*")) + [tree / "b/deep/one.gif"]:
        assert data.count_frames(path) == 20, path
        for start in (0, 7, 16):
            clip = data.read_clip(path, start, 2, 3, 32)                            # frames start, start + 3
            level = (clip.mean((1, 2, 3)) + 1) * 127.5
            assert (level - 8 * torch.tensor([start, start + 3.0])).abs().max() < 3, path
    with pytest.raises(ValueError, match="cannot read frames"):
        data.read_clip(tree / "a/v_A_g01_c01.avi", 18, 4, 1, 32)


def test_bad_files_are_skipped_counted_and_named(tree, tmp_path, capsys):
    """Catches a broken file that ends a run or shifts the labels."""
    videos = data.build_dataset(folder_config(tree, tmp_path))
    assert "skipped" in capsys.readouterr().out
    assert len(videos) == 5 and videos.classes == ["a", "deep"]
    assert [videos.classes[i] for i in videos.labels] == [p.parent.name for p in videos.files]
    index = json.loads((tmp_path / "index.json").read_text())
    assert len(index) == 8 and index["a/text.avi"]["error"] and index["a/text.avi"]["frames"] == 0
    (tmp_path / "other").mkdir()
    write_clip(tmp_path / "other/x.mp4")
    data.build_dataset(folder_config(tmp_path / "other", tmp_path))
    assert len(json.loads((tmp_path / "index.json").read_text())) == 9              # another folder wipes nothing out


def write_clip(path, count=12, size=(48, 64), codec="libx264", pixels="yuv420p", gop=12, stamps=None, **container):
    """A clip whose left half has grey level 20 k in frame k, and whose right half is white."""
    with av.open(str(path), "w", **container) as file:
        stream = file.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *size, pixels, gop
        for k in range(count):
            picture = np.full((*size, 3), 255, np.uint8)
            picture[:, :size[1] // 2] = 20 * k % 256
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = (stamps[k] if stamps else k), Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return Path(path).read_bytes()


def bad_files(folder):
    """Thirty kinds of file that no run can use, in `folder`."""
    whole = {kind: write_clip(folder / f"cut.{kind}", codec=codec) for kind, codec in
             [("mp4", "libx264"), ("mov", "libx264"), ("avi", "mpeg4"), ("mkv", "libx264"), ("webm", "libvpx-vp9")]}
    iio.imwrite(folder / "cut.gif", np.arange(12, dtype=np.uint8).repeat(48 * 64 * 3).reshape(12, 48, 64, 3) * 20)
    whole["gif"] = (folder / "cut.gif").read_bytes()
    for kind, content in whole.items():                                                     # 1-6: truncated
        (folder / f"cut.{kind}").write_bytes(content[:len(content) * 2 // 5])
    mp4, noise = whole["mp4"], np.random.default_rng(0).bytes(4000)
    image = np.zeros((48, 64, 3), np.uint8)
    media = mp4.index(b"mdat") + 4
    raw = write_clip(folder / "raw.avi", codec="rawvideo", pixels="bgr24")
    size = raw.index(b"strf") + 12
    huge = np.array([60000, 60000], "<i4").tobytes()
    for name, content in {
            "empty.mp4": b"", "empty.avi": b"", "text.avi": b"not a video", "page.webm": b"<html>404 Not Found</html>",
            "list.mp4": b"#EXTM3U\n#EXTINF:2,\nhttp://127.0.0.1:9/x.ts\n", "chain.mov": b"ffconcat version 1.0\nfile a",
            "noise.mkv": noise, "zeros.avi": bytes(4000), "tail.mp4": mp4[len(mp4) // 2:],
            "index.mp4": mp4.replace(b"moov", b"xxxx"), "scrambled.mp4": mp4[:media] + noise[:600] + mp4[media + 600:],
            "picture.mp4": iio.imwrite("<bytes>", image, extension=".png"),
            "photo.avi": iio.imwrite("<bytes>", image, extension=".jpg"),
            "wide.gif": whole["gif"][:6] + b"\xe0\x2e\xe0\x2e" + whole["gif"][10:],
            "raw.avi": raw[:size] + huge + raw[size + 8:]}.items():                         # 7-21
        (folder / name).write_bytes(content)
    write_clip(folder / "one.mp4", 1)                                                       # 22
    write_clip(folder / "one.gif", 1, codec="gif", pixels="rgb8")                           # 23
    write_clip(folder / "seven.mkv", 7)                                                     # 24: one too few
    both = [write_clip(folder / "grows.mp4", size=s, format="h264") for s in ((48, 64), (64, 96))]
    (folder / "grows.mp4").write_bytes(b"".join(both))                                      # 25
    for name, codec in (("sound.mp4", "aac"), ("sound.avi", "pcm_s16le")):                  # 26, 27
        with av.open(str(folder / name), "w") as file:
            stream = file.add_stream(codec, rate=8000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32 if codec == "aac" else np.int16),
                                               format="fltp" if codec == "aac" else "s16", layout="mono")
            sound.sample_rate = 8000
            file.mux(stream.encode(sound))
            file.mux(stream.encode())
    (folder / "dangling.mp4").symlink_to("nowhere.mp4")                                     # 28
    (folder / "itself.mp4").symlink_to("itself.mp4")                                        # 29
    os.mkfifo(folder / "pipe.mp4")                                                          # 30
    (folder / "empty.mp4").chmod(0)                                                         # root may read it
    (folder / "loop").symlink_to("..")


def test_thirty_bad_files_beside_ten_good_ones(tmp_path, capsys):
    """Catches a hostile file that ends, hangs or bloats a run or shifts the labels, and odd good ones read wrongly."""
    root = tmp_path / "tree"
    for folder in ("a", "b.avi", "broken", "c"):        # a folder may be called like a video
        (root / folder).mkdir(parents=True)
    bad_files(root / "broken")
    write_clip(root / "a/plain.mp4")
    write_clip(root / "a/odd.mkv", size=(47, 63), pixels="yuv444p")
    write_clip(root / "a/large.mp4", 8, size=(2160, 3840))
    write_clip(root / "a/rates.mp4", stamps=[k * k for k in range(12)])
    upright = write_clip(root / "b.avi/turned.mp4")
    matrix = upright.index(b"tkhd") + 44                # a quarter turn to the right
    turn = np.array([0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    (root / "b.avi/turned.mp4").write_bytes(upright[:matrix] + turn + upright[matrix + 36:])
    write_clip(root / "b.avi/deep.mkv", codec="ffv1", pixels="yuv420p10le")
    write_clip(root / "b.avi/grey.mkv", codec="ffv1", pixels="gray")
    write_clip(root / "c/alpha.mov", codec="qtrle", pixels="argb")
    write_clip(root / "c/it's \"a\"\nnew: é 漢 %03d.mp4")
    write_clip(root / "c/name.avi", codec="mpeg4")
    os.rename(root / "c/name.avi", os.fsencode(root) + b"/c/\xff.avi")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    videos = data.build_dataset(folder_config(root, tmp_path / "out", frames=8))
    assert "30 of 40 videos" in capsys.readouterr().out
    assert [videos.classes[i][0] for i in videos.labels] == list("aaaabbbccc") and len(videos.classes) == 4
    index = json.loads((tmp_path / "out/index.json").read_text())
    refused = {name: found for name, found in index.items() if found["frames"] < 8}
    assert len(index) == 40 and len(refused) == 30 and all(name.startswith("broken/") for name in refused)
    assert all(found["error"] or found["frames"] for found in refused.values())
    for i, path in enumerate(videos.files):
        clip, label = videos[i, i]
        clip = clip.transpose(2, 3) if path.name == "turned.mp4" else clip
        dark = (clip[..., 8:24, 2:8].mean((1, 2, 3)) + 1) * 127.5                           # (T,)
        assert clip.shape == (8, 3, 32, 32) and label == videos.labels[i], path
        assert (dark.diff() - 20).abs().max() < 4 and clip[..., -6:].mean() > 0.95, (path, dark)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6, "more than 1 GB"
    again = data.build_dataset(folder_config(root, tmp_path / "out", frames=8))
    assert again.files == videos.files                  # from the index, names that are no text included


def test_a_file_deleted_while_training(tmp_path, capsys):
    """Catches a file that vanished after the scan and ends the run, or whose label stays behind with another clip."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_clip(tmp_path / name / "x.mp4")
    videos = data.build_dataset(folder_config(tmp_path, tmp_path))
    videos.files[0].unlink()
    assert {videos[0, seed][1] for seed in range(4)} == {1}
    assert "skipping" in capsys.readouterr().err


@pytest.mark.parametrize("name, codec", [("x.mp4", "libx264"), ("x.mkv", "libx264"), ("x.mov", "mpeg4"),
                                         ("x.avi", "mpeg4"), ("x.webm", "libvpx-vp9")])
def test_seeking_is_exact(tmp_path, name, codec):
    """Catches a seek to a wrong frame, and pixels that depend on where decoding began."""
    write_clip(tmp_path / name, 50, codec=codec)
    count, keys = data.survey(tmp_path / name)
    whole = data.read_frames(tmp_path / name, range(50))
    assert count == 50 and len(keys) >= 4 and len({frame.tobytes() for frame in whole}) > 12
    for start in range(47):
        assert np.array_equal(data.read_frames(tmp_path / name, range(start, start + 4), keys), whole[start:start + 4])
    stamp = keys[2][1]
    assert next(data.decode(tmp_path / name, stamp)).pts == stamp                           # it did seek ..
    for wrong in (-5, 10 ** 9):                                                             # .. and else starts over
        assert np.array_equal(data.read_frames(tmp_path / name, [30, 33], [[0, None], [24, wrong]]), whole[[30, 33]])


def test_loader_bench(tmp_path, tree, capsys):
    """Catches a timing command that does not run, or that loses a part of what a clip costs."""
    rates = data.main(flags(dict(dataset="folder", data_root=tree, out=tmp_path, frames=4, resolution=32, workers=1,
                                 clips=16, batch=8, bench=True)))
    told = capsys.readouterr().out
    assert set(rates) == {0, 1} and all(part in told for part in ("decode", "resize", "copy", "1 workers"))


def test_split_keeps_groups_apart(tree, tmp_path):
    """Catches a split by clip, which leaks: clips of one group are cut from one source video."""
    train, held = (data.build_dataset(folder_config(tree, tmp_path, split="train"), held_out=h) for h in (False, True))
    groups = [{data.group_of(p.relative_to(tree)) for p in d.files} for d in (train, held)]
    assert not groups[0] & groups[1] and {9, 10} <= groups[0] and {1, 2} <= groups[1]
    assert data.split_groups("1-3,7") == {1, 2, 3, 7} and len(data.split_groups("all")) == 25


def test_clips_are_shaped_scaled_and_mirrored(tree, tmp_path):
    """Catches [0, 1] pixels, a crop off the centre, a flip in time, clips that ignore their seed, a stale memory."""
    ramp = np.zeros((1, 40, 80, 3), np.uint8)
    ramp[:, :, 40:] = 255                               # right half white: a centred square crop is half white
    clip = data.to_clip(ramp, 20)
    assert clip.shape == (1, 3, 20, 20) and clip.min() == -1 and clip.max() == 1 and abs(clip.mean()) < 0.06
    videos = data.build_dataset(folder_config(tree, tmp_path, flip=True))
    kept = data.build_dataset(folder_config(tree, tmp_path, flip=True, in_memory=True, stride=2))
    fresh = data.build_dataset(folder_config(tree, tmp_path, flip=True, stride=2))
    assert all(torch.equal(kept[i, seed][0], fresh[i, seed][0]) for seed in (5, 6, 5) for i in range(len(kept)))
    levels = {round(float(videos[0, seed][0][0].mean()), 2) for seed in range(12)}
    assert len(levels) > 3
    assert (videos[0, 3][0].mean((1, 2, 3)).diff() > 0).all()                       # time runs forward


def test_missing_data_names_the_tree(tmp_path):
    """Catches a traceback where a newcomer needs the expected folder layout."""
    for root in ("", str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(SystemExit, match="(?s)expects.*UCF101.rar"):
            data.build_dataset(tiny(dataset="ucf", data_root=root, out=str(tmp_path)))


def test_toy_clips_never_coincide():
    """Catches held-out clips drawn from the training stream, and clips that do not follow from the seed."""
    cfg = tiny(frames=8)
    train, held = data.ToyVideos(cfg), data.ToyVideos(cfg, held_out=True)
    assert torch.equal(train[5, 0][0], train[5, 1][0]) and train[5, 0][1] == 5
    first = torch.stack([train[i, 0][0] for i in range(64)])
    other = torch.stack([held[i, 0][0] for i in range(64)])
    assert (first[:, None] - other[None]).abs().amax((2, 3, 4, 5)).min() > 0.05
    assert first.min() >= -1 and first.max() <= 1 and len(train.classes) == 8


def test_saved_videos_read_back(tmp_path):
    """Catches channel swaps, lost frames and truncation instead of rounding on the way to a file."""
    video = torch.zeros(5, 3, 32, 32) - 1
    video[:, 0, :, 16:] = 1                             # right half red
    video[torch.arange(5), 1, torch.arange(5)] = 1      # frames differ, else a gif merges them
    for name in ("x.mp4", "x.gif"):
        data.save_video(tmp_path / name, video)
        back = np.stack(list(iio.imiter(tmp_path / name, plugin="pyav")))
        assert len(back) == 5 and back[2, 100, 50].max() < 60
        assert back[2, 100, 200, 0] > 200 and back[2, 100, 200, 2] < 60
    data.save_video(tmp_path / "x.png", video)
    assert iio.imread(tmp_path / "x.png").shape[1] > 5 * 32
    assert data.to_uint8(torch.full((3, 1, 1), 0.997))[0, 0, 0] == 255              # 254.6: rounded, not cut


def test_degraded_videos():
    """Catches a degradation that does nothing, moves pixels about, or touches the clip it was given."""
    video = torch.stack([data.draw_toy(np.random.default_rng(i), i, 4, 64) for i in range(8)])      # (8, 4, 3, 64, 64)
    before = video.clone()
    for kind in ("downsample", "blur", "inpaint"):
        seen = data.degrade(video, kind)
        error = (seen - video).square().mean()
        assert seen.shape == video.shape and seen.abs().max() <= 1.001 and error > 1e-4
        shifted = torch.roll(seen, 16, -1)              # where the damage is centred, no shift comes closer
        assert (shifted - video).square().mean() > error
        assert torch.equal(data.degrade(video[3:4], kind), seen[3:4])
    hidden = (data.degrade(video, "inpaint") == 0).all(2).float().mean()
    assert abs(hidden - 1 / 7) < 0.02 and torch.equal(video, before) and data.degrade(video, "none") is not None
    assert torch.equal(data.degrade(video, "none"), video)


def test_condition_videos():
    """Catches a condition that shows the future, or edges that leave the pixel range."""
    video = torch.rand(2, 16, 3, 8, 8) * 2 - 1
    shown = data.condition_video(video, "frames")
    assert torch.equal(shown[:, :5], video[:, :5])
    assert torch.equal(shown[:, 5:], video[:, 4:5].expand(-1, 11, -1, -1, -1))
    assert torch.equal(data.condition_video(video, "image"), video[:, :1].expand_as(video))
    edges = data.condition_video(video, "edge")
    assert edges.shape == video.shape and edges.min() >= -1 and edges.max() <= 1
    assert (data.condition_video(torch.zeros(1, 2, 3, 8, 8), "edge") == -1).all()


# ---------------------------------------------------------------------------------------------- behaviour

def test_overfits_one_clip(tmp_path):
    """Catches a decoder or loss that cannot learn: one clip has to come close in a few steps."""
    settings = {**TINY, "overfit": True, "model": "16", "gen_channels": 16, "steps": 80, "lr": 1e-2, "batch": 1,
                "kl_weight": 0.0, "frames_per_step": 4, "ema": 0.9, "warmup": 10, "eval_every": 80}
    nerv_vae.main(["--out", str(tmp_path), *flags(settings)])
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert row["psnr_train"] > 22


def test_ema_is_what_is_loaded(run):
    """Catches sampling with raw weights: after training, load_vae and load_dit must return the averaged ones."""
    for load, path in ((nerv_vae.load_vae, run.vae), (nerv_dit.load_dit, run.dit)):
        ckpt, model = torch.load(path, weights_only=True), load(path, "cpu")
        state = model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in ckpt["ema"].items())
        assert any(not torch.equal(ckpt["model"][k], v) for k, v in ckpt["ema"].items())


def test_ema_formula():
    """Catches an average that moves the wrong way."""
    old, new = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * old.weight.detach() + 0.1 * new.weight.detach()
    nerv_vae.update_ema(old, new, 0.9, step=10_000)
    torch.testing.assert_close(old.weight.detach(), expected)


@pytest.mark.parametrize("stage", ["vae", "gan with workers", "dit"])
def test_resume_is_exact(run, tree, tmp_path, monkeypatch, stage):
    """Catches unsaved state, and clips or noise that start over: 3 steps, SIGTERM, 3 steps are 6 steps, bit by bit."""
    gan = dict(dataset="folder", data_root=tree, workers=2, gan_weight=1.0, gan_every=2, frames_per_step=2, gan_start=1,
               batch=2, lpips_weight=0.0, kernel_init=0.1, patch_frames=2, resolution=16, muon=True)
    module, base = {"vae": (nerv_vae, flags({**TINY, "steps": 6, "eval_every": 6})),
                    "gan with workers": (nerv_vae, flags({**TINY, **gan, "steps": 6})),
                    "dit": (nerv_dit, ["--vae", str(run.vae), *flags({**TINY_DIT, "steps": 6, "scheduled_sampling": 1.0,
                                                                     "ss_ramp": 0.0})])}[stage]
    whole = torch.load(module.main([*base, "--out", str(tmp_path / "whole")]), weights_only=True)
    keep = module.update_ema

    def stop_in_the_third_step(ema, model, decay, step):
        keep(ema, model, decay, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "update_ema", stop_in_the_third_step)
    with pytest.raises(SystemExit) as stop:
        module.main([*base, "--out", str(tmp_path / "halves")])
    assert stop.value.code == 143
    monkeypatch.setattr(module, "update_ema", keep)
    stopped = torch.load(tmp_path / "halves/ckpt.pt", weights_only=True)
    assert stopped["step"] == 3
    if stage != "dit":                                  # usable as it is: averaged weights with their own statistics
        assert stopped["ema"]["encoder.norm.num_batches_tracked"] > 0
        log = [json.loads(line) for line in open(tmp_path / "whole/log.jsonl")]
        assert whole["best"] == max(row.get("psnr_held_out", row.get("psnr_train", -math.inf)) for row in log)
    resumed = torch.load(module.main([*base, "--out", str(tmp_path / "halves")]), weights_only=True)
    assert resumed["step"] == whole["step"] == 6
    if stage == "gan with workers":                     # each weight has one optimizer, Muon the encoder's matrices
        adam, muon = (whole[key]["state"].values() for key in ("opt", "muon"))
        sizes = [sum(buffer["exp_avg"].numel() for buffer in adam), sum(b["momentum_buffer"].numel() for b in muon)]
        matrices = [v.numel() for k, v in whole["model"].items() if "encoder" in k and v.ndim == 2]
        learned = nerv_vae.load_vae(tmp_path / "whole/ckpt.pt", "cpu").parameters()
        assert sizes == [sum(p.numel() for p in learned) - sum(matrices), sum(matrices)]
    for part in {"model", "ema", "critic"} & set(whole):
        for name, value in whole[part].items():
            assert torch.equal(value, resumed[part][name]), f"{part}.{name} differs after resuming"


def test_batchnorm_of_ranks_survives_large_means(monkeypatch):
    """Catches a variance over ranks taken as a difference of large numbers, which is wrong by a third, or below 0."""
    x = (300 + 0.3 * torch.randn(512, 8)).requires_grad_()
    alone, ranks = nerv_vae.BatchNorm(8).double(), nerv_vae.BatchNorm(8)
    expected = alone(x.double())                        # two ranks with the same tokens have the same statistics
    monkeypatch.setattr(nerv_vae, "WORLD", 2)
    monkeypatch.setattr(nerv_vae.SumOverRanks, "apply", lambda x: 2 * x)
    torch.testing.assert_close(ranks(x), expected.float(), rtol=0, atol=5e-3)
    torch.testing.assert_close(ranks.running_var, alone.running_var.float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_two_processes_are_one(run, tree, tmp_path, stage):
    """Catches ranks that train on the same clips or noise, BatchNorm over half a batch, gradients that add up."""
    gan = dict(dataset="folder", data_root=tree, gan_weight=1.0, gan_every=1, frames_per_step=0, gan_start=0, steps=5,
               lpips_weight=0.0, kernel_init=0.1, patch_frames=2, gan_lr_ratio=1.0, workers=0, lr=5e-5, eval_every=5,
               resolution=16)
    dit = ["--vae", str(run.out / "two/ckpt.pt"), *flags({**TINY_DIT, "steps": 5, "workers": 0})]
    module, words = {"vae": (nerv_vae, flags({**TINY, **gan})), "dit": (nerv_dit, dit)}[stage]
    if stage == "dit":                                  # a tokenizer of the little tree, so that its cache is quick
        nerv_vae.main(["--out", str(run.out / "two"), *flags({**TINY, **gan, "steps": 1})])
    one = torch.load(module.main([*words, "--out", str(tmp_path / "one")]), weights_only=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", module.__file__]
    result = subprocess.run([*torchrun, *words, "--out", str(tmp_path / "two")], capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    two = torch.load(tmp_path / "two/ckpt.pt", weights_only=True)
    # Attention does not depend on a shift of all keys, nor BatchNorm on one of its input: their biases get rounding
    # errors for gradients, which Adam makes as large as any.
    free = ("qkv.bias", "blocks.0.mlp.2.bias", "norm.running_mean") if stage == "vae" else ("qkv.bias",)
    for part in {"model", "ema", "critic"} & set(one):
        for name, value in one[part].items():
            if not name.endswith(free):
                torch.testing.assert_close(value, two[part][name], rtol=0, atol=1e-5, msg=f"{part}.{name}")
    logs = [[json.loads(line) for line in open(tmp_path / which / "log.jsonl")] for which in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        for key in a.keys() - {"clips_per_s", "token_std"}:                         # stds do not average
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key


def test_bad_numbers_are_skipped_and_ten_in_a_row_stop(tree, tmp_path, monkeypatch):
    """Catches one bad batch that ruins the weights for good, and a run that goes on for days without learning."""
    settings = {**TINY, "dataset": "folder", "data_root": tree, "patch_frames": 2, "gan_weight": 0.0, "workers": 0,
                "lpips_weight": 0.0, "frames_per_step": 0, "steps": 6, "eval_every": 6, "muon": True}
    keep, calls = F.mse_loss, []

    def bad_third(a, b):
        calls.append(1)
        return keep(a, b) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(nerv_vae.F, "mse_loss", bad_third)
    ckpt = torch.load(nerv_vae.main(["--out", str(tmp_path / "a"), *flags(settings)]), weights_only=True)
    rows = [json.loads(line) for line in open(tmp_path / "a/log.jsonl")]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert {float(s["step"]) for s in ckpt["opt"]["state"].values()} == {5.0}
    assert all(v.isfinite().all() for part in ("model", "ema") for v in ckpt[part].values())
    monkeypatch.setattr(nerv_vae.F, "mse_loss", lambda a, b: keep(a, b) * math.nan)
    with pytest.raises(SystemExit, match="^10 steps in a row.*step 10, loss nan.*v_[AB]_g") as stop:
        nerv_vae.main(["--out", str(tmp_path / "b"), *flags({**settings, "steps": 30, "eval_every": 30})])
    assert "\n" not in stop.value.code


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_a_full_disk_costs_no_checkpoint(run, tmp_path, capfd, monkeypatch, stage):
    """Catches a save that destroys the file before it, a run that ends at the first failure, or one that hides it."""
    dit = ["--vae", str(run.vae), *flags({**TINY_DIT, "steps": 3, "eval_every": 1})]
    module, words = {"vae": (nerv_vae, flags({**TINY, "steps": 3, "eval_every": 1})), "dit": (nerv_dit, dit)}[stage]
    first, keep, calls = module.main([*words, "--out", str(tmp_path), "--steps", "1"]), os.fsync, []

    def full(number):
        calls.append(number)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(data.iio, "imwrite", lambda *_, **__: full(0))
    with pytest.raises(SystemExit, match="last save.*failed.*make room"):
        module.main([*words, "--out", str(tmp_path)])
    told = [line for line in capfd.readouterr().err.splitlines() if "No space left" in line]
    assert len(calls) >= 4 and len(told) == len(calls) and not list(tmp_path.glob("*.part"))
    assert nerv_vae.load_checkpoint(first, "cpu", module.MADE_BY)["step"] == 1
    monkeypatch.setattr(os, "fsync", keep)
    monkeypatch.undo()
    assert torch.load(module.main([*words, "--out", str(tmp_path)]), weights_only=True)["step"] == 3


def test_altered_checkpoints_are_refused(run, tmp_path):
    """Catches a damaged file that loads as if whole, ends in a traceback, or claims sizes that are then allocated."""
    blob, rng, path = run.dit.read_bytes(), np.random.default_rng(0), tmp_path / "ckpt.pt"
    whole, refused = torch.load(run.dit, weights_only=True)["model"], 0
    for _ in range(150):
        path.write_bytes(mutate(rng, blob))
        try:
            ckpt = nerv_vae.load_checkpoint(path, "cpu", nerv_dit.MADE_BY)
            assert all(torch.equal(value, ckpt["model"][name]) for name, value in whole.items())    # harmless padding
        except SystemExit as stop:
            refused += 1
            assert str(path) in stop.code and "\n" not in stop.code
    assert refused > 100
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:                  # small on disk, huge once opened
        bomb.writestr("archive/data.pkl", bytes(1 << 24))
    with pytest.raises(SystemExit, match="damaged"):
        nerv_vae.load_checkpoint(path, "cpu", nerv_dit.MADE_BY)
    with pytest.raises(SystemExit, match="not made by python nerv_vae.py, but by python nerv_dit.py"):
        nerv_vae.load_vae(run.dit, "cpu")


def test_restoration_is_asked_for_the_clean_clip(tmp_path):
    """Catches a loss against the degraded clip, or a log without the PSNR of what went in."""
    settings = {**TINY, "degrade": "inpaint", "steps": 1, "eval_every": 1}
    nerv_vae.main(["--out", str(tmp_path), *flags(settings)])
    row = json.loads((tmp_path / "log.jsonl").read_text())
    held = data.ToyVideos(tiny(), held_out=True)
    clips = torch.stack([held[int(i), 0][0] for i in np.random.default_rng(0).permutation(len(held))[:64]])
    seen = data.degrade(clips, "inpaint")
    expected = (10 * torch.log10(4 / (seen - clips).square().mean((2, 3, 4)))).mean().item()
    assert row["psnr_in"] == pytest.approx(expected, abs=0.01)


def test_resume_refuses_other_settings(run):
    """Catches a run that silently goes on with another model."""
    with pytest.raises(SystemExit, match="--token-dim 8 .now 7."):
        nerv_vae.main(["--out", str(run.vae.parent), *flags({**TINY, "token_dim": 7, "steps": 3})])


def test_gan_and_perceptual_losses_train(tmp_path, monkeypatch):
    """Catches a critic that never steps or sees parts of clips, R1 without gradient; LPIPS is one of random weights."""
    import lpips
    real, look = lpips.LPIPS, nerv_vae.Discriminator.forward
    sizes, frames = set(), set()

    def stand_in(net, verbose):
        net = real(net="squeeze", pnet_rand=True, verbose=False)
        net.register_forward_pre_hook(lambda _, pair: sizes.update(tuple(x.shape) for x in pair))
        return net

    def whole_clips(critic, video):
        frames.add(video.shape[2])
        return look(critic, video)

    monkeypatch.setattr(lpips, "LPIPS", stand_in)
    monkeypatch.setattr(nerv_vae.Discriminator, "forward", whole_clips)
    settings = {**TINY, "frames_per_step": 1, "gan_weight": 1.0, "gan_every": 1, "gan_channels": 8, "r1_weight": 1.0,
                "lpips_weight": 1.0, "lpips_start": 1, "gan_start": 2, "batch": 2, "steps": 3, "eval_every": 3}
    path = nerv_vae.main(["--out", str(tmp_path), *flags(settings)])
    first, *_, row = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert {"gan", "lpips", "d_real", "d_fake"} <= set(row) and all(math.isfinite(v) for v in row.values())
    assert first["step"] == 1 and "lpips" not in first                              # small frames are enlarged; all
    assert sizes == {(2 * 1, 3, 64, 64), (2 * 4, 3, 64, 64)} and frames == {4}      # are decoded once the critic looks
    moved = torch.load(path, weights_only=True)["opt_d"]["state"]
    assert moved and all(s["exp_avg"].abs().sum() > 0 for s in moved.values())


def test_cached_tokens_are_the_encoders(run):
    """Catches a cache in another order than its labels, or tokens of another clip."""
    vae, cfg = nerv_vae.load_vae(run.vae, "cpu"), nerv_dit.Config(vae=str(run.vae), out=str(run.dit.parent), **TINY_DIT)
    cache, meta = nerv_dit.cache_tokens(cfg, vae, "cpu")
    clips = data.build_dataset(vae.cfg)
    for row in (0, 77, len(cache) - 1):
        video, label = clips[meta["videos"][row], 0]
        cached, fresh = torch.from_numpy(cache[row, 0].copy()).float(), vae.encode(video[None])[0][0]
        torch.testing.assert_close(cached, fresh, rtol=0.01, atol=0.01)
        assert label == meta["labels"][row]


def test_a_replaced_video_is_encoded_again(run, tmp_path):
    """Catches a stale cache: old tokens of a video that another has replaced under the same name."""
    (tmp_path / "videos").mkdir()
    vae, caches = nerv_dit.load_vae(run.vae, "cpu"), []
    (tmp_path / "ckpt.pt").write_bytes(run.vae.read_bytes())
    cfg = nerv_dit.Config(f"{tmp_path}/ckpt.pt", dataset="folder", data_root=f"{tmp_path}/videos", out=str(tmp_path))
    for count in (12, 20):
        write_clip(tmp_path / "videos/x.mp4", count=count)
        nerv_dit.cache_tokens(cfg, vae, "cpu")
        caches.append(len(list(tmp_path.glob("tokens-*.npy"))))
    assert caches == [1, 2]


# ---------------------------------------------------------------------------------------------- measurements

def exact_sample(n, root, seed=0):
    """n rows with mean exactly 0 and covariance exactly root^T root. Shapes: root (d, d) -> (n, d)."""
    x = torch.randn(n, len(root), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(x - x.mean(0)).Q * (n - 1) ** 0.5 @ root


def write_npz(path, videos, **settings):
    np.savez(path, videos=videos, labels=np.arange(len(videos)) % 2, settings=np.array(json.dumps(settings)))
    return str(path)


def toy_bytes(n, frames=8, size=32):
    return data.to_uint8(torch.stack([data.draw_toy(np.random.default_rng(i), i % 8, frames, size) for i in range(n)]))


def run_fvd(tmp_path, *argv):
    out = json.loads(fvd.main([*argv, "--out", str(tmp_path / "out.json")]).read_text())
    return {name: row["value"] for name, row in out["results"].items()}, out["protocol"]


class Probe(torch.nn.Module):       # a feature network that returns how it was called and what it was fed
    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        flags = torch.tensor([rescale, resize, return_features, x.dtype == torch.uint8]).float()
        return torch.cat([flags.expand(x.shape[0], 4), x.flatten(1).float()], 1)


def test_frechet_distance_closed_forms():
    """Catches a lost square or factor 2, 1/n for 1/(n-1), the root of a singular covariance, moments in float32."""
    d, n, rng = 40, 300, torch.Generator().manual_seed(1)
    root, other, turn = torch.randn(3, d, d, generator=rng, dtype=torch.float64)
    a, b, close = exact_sample(n, root), exact_sample(n, other, 3) + 0.1, lambda x: pytest.approx(float(x), rel=1e-10)
    assert fvd.frechet_distance(a, a + 2) == close(4 * d)                                       # shift
    assert fvd.frechet_distance(a, 1.3 * a) == close(0.09 * root.square().sum())                # scale
    x, y = torch.rand(2, d, generator=rng, dtype=torch.float64)                                 # commuting diagonals
    x_rows, y_rows = exact_sample(n, x.diag()), exact_sample(n + 7, y.diag(), 2)
    assert fvd.frechet_distance(x_rows, y_rows) == close((x - y).square().sum())
    line, (u, w) = exact_sample(n, torch.ones(1, 1).double()), root[:2]                         # rank one
    assert fvd.frechet_distance(line * u, line * w) == close(u @ u + w @ w - 2 * abs(u @ w))
    turn, apart = torch.linalg.qr(turn).Q, close(fvd.frechet_distance(a, b))
    assert fvd.frechet_distance(b, a) == apart and fvd.frechet_distance(a @ turn, b @ turn) == apart
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).sqrt().real.sum()                       # by a matrix root
    assert 0.01 * d + root.norm() ** 2 + other.norm() ** 2 - 2 * cross == apart
    few = torch.randn(64, 400, generator=rng)                                                   # n below d
    assert fvd.frechet_distance(few, few) < 1e-6 and fvd.frechet_distance(few, few.flip(0)) < 1e-6
    assert fvd.frechet_distance(few.double() + 100, few.double() + 101) == pytest.approx(400, rel=1e-9)
    for bad in (few[:1], few[:, :3], few * float("nan")):
        with pytest.raises(ValueError, match="finite"):
            fvd.frechet_distance(few, bad)


def test_inception_score_psnr_ssim():
    """Catches a KL the wrong way round, a peak of 1 for pixels that span 2, a window that does not sum to 1."""
    assert fvd.inception_score(torch.eye(101).repeat(3, 1)) == pytest.approx(101)
    a = torch.zeros(2, 3, 3, 16, 16)
    assert fvd.psnr(a, a + 0.2).shape == (2, 3) and fvd.psnr(a, a + 0.2).mean().item() == pytest.approx(20, abs=1e-5)
    assert fvd.ssim(a - 1, a + 1).mean().item() == pytest.approx(9.999e-5, rel=1e-6) and fvd.ssim(a, a).min() > 1 - 1e-9
    assert fvd.ssim(a + 0.2, a - 0.4)[0, 0].item() == pytest.approx((2 * .6 * .3 + 1e-4) / (.36 + .09 + 1e-4), rel=1e-5)
    for bad in (a[:1], a + 127, a * float("nan")):
        with pytest.raises(ValueError, match="one shape"):
            fvd.psnr(a, bad)


@pytest.mark.filterwarnings("ignore")
def test_lpips_of_a_clip_with_itself():
    """Catches clips and frames that change places (true SqueezeNet weights, where they are)."""
    if not (Path(torch.hub.get_dir()) / "checkpoints" / "squeezenet1_1-b8a52dc0.pth").exists():
        pytest.skip("no SqueezeNet weights in the torch hub cache")
    a = torch.from_numpy(toy_bytes(2, frames=3)).permute(0, 1, 4, 2, 3) / 127.5 - 1
    b = torch.cat([a.flatten(0, 1)[:5], torch.zeros(1, 3, 32, 32)]).view_as(a)
    net = data.load_lpips("squeeze", "cpu")
    assert fvd.lpips_distance(a, a, net).abs().max() == 0
    assert (fvd.lpips_distance(a, b, net) > 0.01).nonzero().tolist() == [[1, 2]]


def test_networks_see_the_documented_input(tmp_path, monkeypatch):
    """Catches truncation to bytes, BTCHW for BCTHW, pixels in [0, 1], flags left off, a bottleneck that is ignored."""
    path, kept, frechet = tmp_path / "probe.pt", [], fvd.frechet_distance
    torch.jit.script(Probe()).save(path)
    monkeypatch.setattr(fvd, "I3D_SHA256", fvd.hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(fvd, "frechet_distance", lambda a, b: kept.append(a) or frechet(a, b))
    video = torch.rand(2, 10, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    video[0, 0, :, 0, 0] = torch.tensor([0.0, 254.9, 127.6]) / 127.5 - 1
    seen = fvd.load_i3d(path)(video)
    assert seen[:, :4].tolist() == [[1, 1, 1, 1]] * 2 and seen[0, 4::160].tolist() == [0, 255, 128]
    assert torch.equal(seen[:, 4:].view(2, 3, 10, 4, 4), ((video + 1) * 127.5).round().transpose(1, 2))
    side = write_npz(tmp_path / "a.npz", clips := toy_bytes(4, frames=5, size=8))
    argv = ["--real", side, "--fake", side, "--features", str(path), "--frames", "3"]
    assert "FD-probe" in run_fvd(tmp_path, *argv)[0]
    fed, want = kept[0][:, 4:].view(4, 3, 3, 8, 8), torch.from_numpy(clips[:, :3]).permute(0, 4, 1, 2, 3) / 127.5 - 1
    assert max(min((f - w).abs().max() for f in fed) for w in want) < 1e-6                      # in any order
    run_fvd(tmp_path, *argv, "--fvd-resolution", "4")
    assert kept[-1].shape[1] == 4 + 3 * 3 * 4 * 4


def test_i3d_is_checked_before_it_runs(tmp_path, monkeypatch):
    """Catches the opening of a file of unknown code, and an offline user who is not told the way to the true one."""
    def offline(url, file, hash_prefix):
        raise OSError("no network") if hash_prefix == fvd.I3D_SHA256 else pytest.fail("downloaded without its hash")
    (tmp_path / "i3d.pt").write_bytes(b"anything")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(SystemExit, match="not opened"):
        fvd.load_i3d(tmp_path / "i3d.pt")
    with pytest.raises(SystemExit) as stop:
        fvd.load_i3d()
    for part in (*fvd.I3D_URLS, fvd.I3D_SHA256, "51,235,320", str(tmp_path / "hub/checkpoints/i3d_torchscript.pt")):
        assert part in str(stop.value)


def test_fvd_of_a_pair(tmp_path, capsys):
    """Catches clips that lose their partner, a protocol that is not written down, results that depend on the batch."""
    clips, about = toy_bytes(24), dict(pair="x", classes=["a", "b"], guidance=2.0)
    noise = np.random.default_rng(0).integers(-9, 10, clips.shape) * np.arange(24).reshape(-1, 1, 1, 1, 1) // 6
    noisy, picks = np.clip(clips + noise, 0, 255).astype(np.uint8), np.random.default_rng(0).permutation(24)[:20]
    real, fake = write_npz(tmp_path / "a.npz", clips, **about), write_npz(tmp_path / "b.npz", noisy, **about)
    argv = ["--real", real, "--fake", fake, "--features", "random", "--lpips-net", "none", "--n", "20"]
    rows, protocol = run_fvd(tmp_path, *argv, "--nearest", "2", "--bias-curve", "--action-similarity", "4")
    a, b = (torch.from_numpy(v[picks]).permute(0, 1, 4, 2, 3) / 127.5 - 1 for v in (clips, noisy))
    assert rows["PSNR"] == pytest.approx(fvd.psnr(a, b).mean().item(), rel=1e-6) and 0 < rows["SSIM"] < 1
    direct = pytest.approx(fvd.frechet_distance(fvd.random_features(a), fvd.random_features(b)), rel=1e-3)
    assert rows["FD-random"] == direct == run_fvd(tmp_path, *argv, "--batch", "3")[0]["FD-random"]
    assert rows["flickering fake"] < rows["flickering real"] < 1 and 0 < rows["action similarity real"] <= 1
    assert rows["FD-random floor"] > 0 < rows["FD-random n=10"] and (tmp_path / "out.png").exists()
    assert protocol["fake_guidance"] == 2 and sum(protocol["real_labels"].values()) == 20
    assert re.search("not FVD.*warning: 20 clips.*fake_guidance", capsys.readouterr().out, re.S)


def test_token_diagnostics(tmp_path):
    """Catches plain kurtosis for excess, a KL without its half, dead dims read from the width, rows mixed up."""
    rng, path = np.random.default_rng(0), tmp_path / "tokens-x.npy"
    mean = rng.normal(0, 1, (20, 8, 16)).repeat(15, 0) + rng.normal(0, 0.05, (300, 8, 16))      # 15 clips of a video
    logvar = np.full_like(mean, np.log(0.25))
    mean[:, 0], mean[:, 1], logvar[:, :2] = -0.5, 0.5, 0                                        # 2 of 8 tokens are dead
    np.save(path, np.stack([mean, logvar], 1).astype(np.float16))
    path.with_suffix(".json").write_text(json.dumps(dict(videos=np.arange(20).repeat(15).tolist())))
    rows, _ = run_fvd(tmp_path, "--tokens", str(path))
    square, kl = (mean ** 2 + np.exp(logvar)).mean(), 0.5 * (mean ** 2 + np.exp(logvar) - 1 - logvar).mean()
    assert rows["dead dims"] == 0.25 and rows["KL per dim"] == pytest.approx(kl, rel=1e-2)
    assert max(abs(rows["mean"]), abs(rows["skew"])) < 0.1 and rows["std"] == pytest.approx(square ** 0.5, rel=1e-2)
    assert abs(rows["kurtosis"]) < 0.3 and min(rows["purity"], rows["NMI"]) > 0.9
    assert fvd.purity_and_nmi(torch.arange(12) % 3, torch.arange(12) // 6) == pytest.approx((0.5, 0), abs=1e-9)


def test_bad_input_is_one_line(tmp_path):
    """Catches tracebacks where a newcomer needs a sentence."""
    good, other, broken = write_npz(tmp_path / "good.npz", toy_bytes(6)), tmp_path / "o.npz", tmp_path / "b.npz"
    np.savez(other, x=np.zeros(3))
    broken.write_bytes(b"PK nonsense")
    floats, few = write_npz(tmp_path / "f.npz", toy_bytes(6) / 255), write_npz(tmp_path / "few.npz", toy_bytes(2))
    short, five = write_npz(tmp_path / "s.npz", toy_bytes(6, frames=4)), write_npz(tmp_path / "five.npz", toy_bytes(5))
    cases = [[str(fake)] for fake in (other, broken, floats, few, short, tmp_path / "nowhere", "")]
    flags = "--batch 0|--features no.pt|--features i3d|--frames 9|--resolution 64|--action-similarity 8|--tokens no.npy"
    cases += [[good, *flag.split()] for flag in flags.split("|")]
    for case in (*cases, [five, "--paired"]):
        with pytest.raises(SystemExit) as stop:
            fvd.main(["--real", good, "--features", "random", "--out", str(tmp_path / "o.json"), "--fake", *case])
        assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, case


# ---------------------------------------------------------------------------------------------- storage and speed

def entropy_bits(symbols):
    counts = np.bincount(symbols.ravel())
    p = counts[counts > 0] / symbols.size
    return -symbols.size * (p * np.log2(p)).sum()


def mutate(rng, blob):
    """One to four bits flipped, a piece cut off, or a piece of the file copied over another place."""
    blob, kind = bytearray(blob), rng.integers(3)
    if kind == 0:
        for i in rng.integers(8 * len(blob), size=rng.integers(1, 5)):
            blob[i // 8] ^= 1 << i % 8
    elif kind == 1:
        del blob[rng.integers(len(blob)):]
    else:
        a, b, n = rng.integers(len(blob), size=3)
        blob[b:b + rng.integers(n + 1)] = blob[a:a + n]
    return bytes(blob)


def test_huffman_round_trip():
    """Catches a code that is not a prefix code, wrong bit order, a lone symbol that takes no bits, a wasteful tree."""
    rng = np.random.default_rng(0)
    for i in range(200):
        share = rng.dirichlet(np.full(rng.integers(1, 257), rng.choice([0.02, 0.3, 5.0])))
        symbols = rng.choice(len(share), p=share, size=rng.integers(1, 400)).astype(np.uint8)
        lengths = sample.code_lengths(np.bincount(symbols, minlength=256))
        payload = sample.huffman_encode(symbols, lengths)
        assert np.array_equal(sample.huffman_decode(payload, lengths, len(symbols)), symbols)
        used = np.array([n for n in lengths if n])
        assert len(used) == 1 or (2.0 ** -used).sum() == 1                         # Kraft: no code is left over
        assert len(payload) <= (entropy_bits(symbols) + len(symbols)) / 8 + 1      # Huffman's bound
    assert sample.code_lengths([5, 0, 0]) == bytes([1, 0, 0])
    assert sample.code_lengths([8, 4, 2, 1, 1]) == bytes([1, 2, 3, 4, 4])
    assert sample.canonical_codes(bytes([1, 2, 3, 4, 4])) == {0: 0b0, 1: 0b10, 2: 0b110, 3: 0b1110, 4: 0b1111}


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_coded_size_is_within_two_percent_of_the_entropy(bits):
    """Catches lengths given to the wrong symbols, and a header or a table that outgrows the tokens."""
    torch.manual_seed(0)
    for tokens in (torch.randn(128 * 128), torch.randn(4096) * torch.linspace(0.5, 1.5, 4096)):
        levels = sample.quantise(tokens, bits)[0]
        payload = sample.huffman_encode(levels, sample.code_lengths(np.bincount(levels)))
        assert entropy_bits(levels) <= 8 * len(payload) <= 1.02 * entropy_bits(levels) + 8
        assert len(sample.pack_tokens(tokens, bits)) <= len(payload) + 2 ** bits + 128


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_quantisation_formula(bits):
    """Catches 2^b for 2^b - 1, floor for round, and a range that misses its ends (NeRV-Enc A.4)."""
    tokens = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    levels, low, scale = sample.quantise(tokens, bits)
    assert (low, levels.min(), levels.max()) == (float(tokens.min()), 0, 2 ** bits - 1)
    assert math.isclose(scale, float(tokens.double().max() - tokens.double().min()) / (2 ** bits - 1))
    error = np.abs(levels * scale + low - tokens.double().numpy())
    assert 0.4 * scale < error.max() <= scale * (0.5 + 1e-9)
    header, stored = sample.unpack_tokens(sample.pack_tokens(tokens, bits, note="x"))
    assert np.array_equal(stored.numpy(), (levels * scale + low).astype(np.float32)) and header["note"] == "x"
    again = sample.unpack_tokens(sample.pack_tokens(stored, bits))[1]
    torch.testing.assert_close(again, stored, rtol=0, atol=1e-6)                    # what is on the grid stays there
    assert torch.equal(sample.unpack_tokens(sample.pack_tokens(tokens, 32))[1], tokens)
    alike = torch.full((6,), -1.5)
    assert torch.equal(sample.unpack_tokens(sample.pack_tokens(alike, bits))[1], alike)


def test_compress_and_decompress(run, tree, tmp_path, capsys):
    """Catches a file that holds other tokens than the encoder's, and one that is played by another tokenizer."""
    vae, clip = nerv_vae.load_vae(run.vae, "cpu"), tree / "a/v_A_g09_c01.mp4"
    words = ["--vae", str(run.vae), "--out", str(tmp_path)]
    for bits in (4, 32):
        sample.main([*words, "--compress", str(clip), "--bits", str(bits)])
        rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:7]]
        assert [row[0] for row in rows] == ["4", "5", "6", "7", "8", "32"] and float(rows[-1][4]) == 0
        path = tmp_path / f"{clip.stem}.nerv"
        assert {row[0]: int(row[1]) for row in rows}[str(bits)] == path.stat().st_size
        tokens = sample.file_tokens(clip, vae, "cpu")[0].flatten()
        header, stored = sample.read_nerv(path)
        assert torch.equal(stored, sample.unpack_tokens(sample.pack_tokens(tokens, bits))[1])
        assert header["vae_sha256"] == nerv_dit.file_hash(run.vae)
    assert torch.equal(stored, tokens)                                              # at 32 bits
    sample.main([*words, "--decompress", str(path)])
    assert data.count_frames(f"{path}.mp4") == data.count_frames(f"{path}.gif") == 4
    other = tmp_path / "other.pt"
    other.write_bytes(run.vae.read_bytes() + b"x")
    with pytest.raises(SystemExit, match="another tokenizer"):
        sample.main(["--vae", str(other), "--out", str(tmp_path), "--decompress", str(path)])
    with pytest.raises(SystemExit) as stop:
        sample.main(["--compress", str(clip), "--bits", "3"])
    assert stop.value.code == 2


@pytest.mark.parametrize("bits", [5, 32])
def test_altered_nerv_files_are_refused(tmp_path, bits):
    """Catches a reader that crashes, believes a size or returns wrong tokens; half of the 1000 have a true checksum."""
    rng, tokens, path = np.random.default_rng(0), torch.randn(48), tmp_path / "x.nerv"
    blob = sample.pack_tokens(tokens, bits, vae_sha256="0" * 64, frames=4, resolution=32)
    stored, refused = sample.unpack_tokens(blob)[1], 0
    for i in range(500):
        altered = mutate(rng, blob[:-4] if i % 2 else blob)
        path.write_bytes(altered + sample.zlib.crc32(altered).to_bytes(4, "little") if i % 2 else altered)
        try:
            read = sample.read_nerv(path)[1]
            assert read.isfinite().all() if i % 2 else torch.equal(read, stored)
        except SystemExit as stop:
            refused += 1
            assert str(path) in str(stop.code) and "\n" not in str(stop.code)
    assert refused > 250
    for head, part in ((dict(count=1 << 60, bits=8), "too short"),                  # and not out of memory
                       (dict(count=7, bits=8, low=0, scale=1e308), "not numbers"),
                       (dict(count=[7], bits=8), "impossible"), (dict(count=7, bits=9), "impossible")):
        head = json.dumps(head).encode()
        lie = sample.MAGIC + len(head).to_bytes(4, "little") + head + bytes([8] * 256) + b"payload"
        path.write_bytes(lie + sample.zlib.crc32(lie).to_bytes(4, "little"))
        with pytest.raises(SystemExit, match=part):
            sample.read_nerv(path)
    with pytest.raises(SystemExit, match="No such file"):
        sample.read_nerv(tmp_path / "missing.nerv")


def test_altered_npz_files_are_refused(tmp_path):
    """Catches pixels read past a wrong checksum, a traceback, and memory taken because a header says so."""
    rng, path, videos = np.random.default_rng(0), tmp_path / "samples.npz", torch.rand(3, 4, 3, 32, 32) * 2 - 1
    store = sample.VideoStore(path, (3, 4, 32, 32, 3), dict(kind="samples"))
    store.add(videos)
    store.close([0, 1, 2])
    blob, whole = path.read_bytes(), sample.load_videos(path, 2)
    torch.testing.assert_close(whole, videos[:2], rtol=0, atol=1 / 255 + 1e-6)
    for _ in range(300):
        path.write_bytes(mutate(rng, blob))
        try:
            assert torch.equal(sample.load_videos(path, 2), whole)
        except SystemExit as stop:
            assert str(path) in str(stop.code) and "\n" not in str(stop.code)
        try:
            side = fvd.NpzVideos(str(path))
            assert torch.equal(torch.stack([side[i, 0][0] for i in range(2)]), whole)
        except SystemExit as stop:
            assert str(path) in str(stop.code) and "\n" not in str(stop.code)
    for shape, dtype in (((1 << 20, 1 << 10, 64, 64, 3), "|u1"), ((3, 4, 8, 8, 3), "<f8"), ((3, 4, 8, 8, 3), "|O")):
        with zipfile.ZipFile(path, "w") as archive, archive.open("videos.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, dict(shape=shape, descr=dtype, fortran_order=False))
            file.write(bytes(4096))
        tracemalloc.start()
        with pytest.raises(SystemExit, match="claims to be"):
            sample.load_videos(path, 8)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()


def test_counted_operations_are_pytorchs():
    """Catches a forgotten factor in the bench's formulas: PyTorch's own counter looks at what really runs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    c = tiny(enc_depth=2, patch_frames=2)
    vae, z = nerv_vae.NeRVVAE(c).eval(), torch.randn(1, 6, 8)
    dit = nerv_dit.DiT(nerv_dit.Config(**TINY_DIT), 6, 8, classes=5)
    decode = 4 * sum(map(generative_nerv.flops, vae.decoder.layers))
    for call, counted in ((lambda: vae.encoder(torch.rand(1, 4, 3, 32, 32)), sample.encoder_flops(c)),
                          (lambda: vae.decoder.instantiate(z[0])(torch.arange(4.0)), decode),
                          (lambda: dit(z, torch.tensor([3]), torch.tensor([1])), sample.dit_flops(dit.cfg, 6, 8))):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()                                      # the counter does not see fused attention on a CPU
        assert abs(counter.get_total_flops() / counted - 1) < 0.02


def test_bench_runs(tmp_path, monkeypatch, capsys):
    """Catches a row of --bench that went out of date with the code it times."""
    once = sample.measure
    monkeypatch.setattr(sample, "measure", lambda call, device, budget: once(call, device, 0))
    sample.bench(sample.Config(batch=1), torch.device("cpu"), tmp_path, tiny(), nerv_dit.Config(**TINY_DIT))
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert len(bench["rows"]) == 10 and len(capsys.readouterr().out.splitlines()) == 13
    assert all(row["latency_s"] > 0 and 0 < row["share"] for row in bench["rows"])
    steps = {row["name"][:3]: row for row in bench["rows"]}
    assert steps["250"]["scale"] == 125 and steps["50 "]["scale"] == 25
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="--device cpu"):
            sample.main(["--bench", "--device", "cuda", "--out", str(tmp_path)])


# ---------------------------------------------------------------------------------------------- end to end

def test_readme_commands(run, tmp_path):
    """Catches a stage that cannot read what the one before it wrote, and output files that are not there."""
    out = sample.main(["--dit", str(run.dit), "--out", str(tmp_path), "--n", "5", "--batch", "3", "--interp",
                       "--time-interp", "3", "--extrapolate", "--overview"])
    with np.load(out / "samples.npz") as file:
        assert file["videos"].shape == (5, 4, 32, 32, 3) and file["videos"].dtype == np.uint8
        assert file["labels"].tolist() == [0, 1, 2, 3, 4]
        assert json.loads(str(file["settings"]))["sample_steps"] == 3
    for name in ("samples.gif", "samples.png", "interp.gif", "interp.png", "time_interp.gif", "extrapolate.png",
                 "overview.gif", "interpolation.png"):
        assert (out / name).stat().st_size > 100
    assert len(list(out.glob("*.mp4"))) == 5 and data.count_frames(out / "time_interp.gif") == 12


def test_overview_rows_belong_together(run, tmp_path, monkeypatch):
    """Catches a clip above another clip's reconstruction, or above a generated video of another class."""
    sheets, keep = [], sample.tile
    monkeypatch.setattr(sample, "tile", lambda videos, *rest: sheets.append((videos, rest)) or keep(videos, *rest))
    words = ["--n", "3", "--classes", "4,0,4", "--overview", "--out", str(tmp_path)]
    out, vae = sample.main(["--dit", str(run.dit), *words]), nerv_vae.load_vae(run.vae, "cpu")
    videos, (columns, names) = sheets[-1]                                           # (9, T, 3, H, W): three rows
    clips = data.build_dataset(vae.cfg, held_out=True)
    assert columns == 3 and names[:3] == [vae.classes[i] for i in (4, 0, 4)]
    for video, label in zip(videos[:3], (4, 0, 4)):
        first = next(i for i, other in enumerate(clips.labels) if other == label)
        assert any(torch.equal(video, clips[first, seed][0]) for seed in range(3))
    recon = vae.decode(vae.encode(videos[:3])[0], torch.arange(4.0))
    torch.testing.assert_close(videos[3:6], recon, rtol=1e-4, atol=1e-4)
    assert np.array_equal(data.to_uint8(videos[6:]), np.load(out / "samples.npz")["videos"])


def test_thumbnails_fit_into_as_many_numbers():
    """Catches a yardstick with more numbers than the tokens have, or one that is blurrier than it has to be."""
    video = torch.rand(2, 4, 3, 8, 8) * 2 - 1
    codes = sample.thumbnails(video, 3 * 8 * 8)
    assert list(codes) == ["1 x 8 x 8", "2 x 5 x 5", "3 x 4 x 4", "4 x 4 x 4"]
    torch.testing.assert_close(codes["1 x 8 x 8"], video.mean(1, keepdim=True).expand_as(video))
    blocks = video.unflatten(4, (4, 2)).unflatten(3, (4, 2)).mean((4, 6))           # (2, 4, 3, 4, 4)
    enlarged = F.interpolate(blocks.flatten(0, 1), 8, mode="bilinear").view_as(video)
    torch.testing.assert_close(codes["4 x 4 x 4"], enlarged)


def test_exported_weights_sample_alike(run, tmp_path):
    """Catches an export of raw weights, a lost token scale, or a pair of files that do not know each other."""
    words = ["--n", "2", "--out", str(tmp_path / "a")]
    whole = np.load(sample.main(["--dit", str(run.dit), *words]) / "samples.npz")["videos"].astype(int)
    sample.main(["--dit", str(run.dit), "--export", str(tmp_path / "toy"), "--out", str(tmp_path)])
    half = np.load(sample.main(["--weights", str(tmp_path / "toy"), *words]) / "samples.npz")["videos"].astype(int)
    assert abs(whole - half).mean() < 2
    assert 2.5 * (tmp_path / "toy-vae.pt").stat().st_size < run.vae.stat().st_size


def test_sampling_goes_on_where_it_stopped(run, tmp_path):
    """Catches a half-written set of samples that starts over or repeats videos."""
    words = ["--dit", str(run.dit), "--n", "4", "--batch", "2"]
    whole = sample.main([*words, "--out", str(tmp_path / "a")]) / "samples.npz"
    keep, calls = sample.VideoStore.add, []

    def stop_after_one(self, videos):
        keep(self, videos)
        calls.append(1)
        raise KeyboardInterrupt

    sample.VideoStore.add = stop_after_one
    try:
        with pytest.raises(KeyboardInterrupt):
            sample.main([*words, "--out", str(tmp_path / "b")])
    finally:
        sample.VideoStore.add = keep
    again = sample.main([*words, "--out", str(tmp_path / "b")]) / "samples.npz"
    assert np.array_equal(np.load(whole)["videos"], np.load(again)["videos"])


def test_reconstruct_writes_a_pair(run, tmp_path):
    """Catches originals and reconstructions in different orders."""
    out = sample.main(["--vae", str(run.vae), "--reconstruct", "--n", "3", "--out", str(tmp_path)])
    a, b = (np.load(out / f"{kind}.npz") for kind in ("original", "reconstruction"))
    assert a["videos"].shape == b["videos"].shape == (3, 4, 32, 32, 3) and np.array_equal(a["labels"], b["labels"])
    assert json.loads(str(a["settings"]))["pair"] == json.loads(str(b["settings"]))["pair"]


@pytest.mark.parametrize("condition", ["none", "frames", "image", "edge"])
@pytest.mark.parametrize("backbone", ["dit", "gpt", "latte"])
def test_every_condition_and_backbone(run, tree, tmp_path, condition, backbone):
    """Catches a task or a backbone that cannot train and sample."""
    settings = {**TINY_DIT, "steps": 1, "guidance": 1.0, "condition": condition, "backbone": backbone}
    dit = nerv_dit.main(["--vae", str(run.vae), "--out", str(tmp_path), *flags(settings)])
    words = ["--dit", str(dit), "--out", str(tmp_path / "s"), "--n", "2"]
    words += [] if condition == "none" else ["--predict", str(tree / "a/v_A_g09_c01.mp4")]
    assert any((sample.main(words)).glob("*.gif"))


def test_every_held_out_clip_gets_its_own_answer(run, tmp_path, monkeypatch):
    """Catches a condition of the wrong clip: where the answer is what was shown, videos are what was shown, decoded."""
    settings = {**TINY_DIT, "steps": 1, "guidance": 1.0, "condition": "image"}
    dit = nerv_dit.main(["--vae", str(run.vae), "--out", str(tmp_path), *flags(settings)])
    seen, still = [], lambda clips: clips[:, :1].expand_as(clips)
    monkeypatch.setattr(sample, "sample_tokens", lambda dit, cond, *_, **__: cond * dit.token_std + dit.token_mean)
    monkeypatch.setattr(sample, "condition_video", lambda clips, kind: seen.append(clips) or still(clips))
    out = sample.main(["--dit", str(dit), "--out", str(tmp_path / "s"), "--n", "5", "--batch", "2"])
    clips, vae = torch.cat(seen), nerv_vae.load_vae(run.vae, "cpu")                 # (5, 4, 3, 32, 32)
    want = [vae.play(vae.encode(still(clip[None]))[0])[0] for clip in clips]
    got = sample.load_videos(out / "samples.npz", 5)
    torch.testing.assert_close(got, torch.stack(want), rtol=0, atol=2 / 127.5)
    assert len(clips) == 5 and torch.pdist(clips.flatten(1)).min() > 0
    with pytest.raises(SystemExit, match="--guidance 1"):
        sample.main(["--dit", str(dit), "--out", str(tmp_path / "s"), "--guidance", "2"])


def test_one_line_for_bad_input(run, tmp_path):
    """Catches tracebacks: each mistake gets one line that names the fix, exit code 1."""
    for main, words, part in [
            (nerv_dit.main, ["--vae", str(tmp_path / "no.pt")], "python nerv_vae.py"),
            (sample.main, ["--dit", str(tmp_path / "no.pt")], "--weights assets/toy"),
            (sample.main, ["--dit", str(run.dit), "--classes", "dragon"], "the classes are"),
            (sample.main, ["--dit", str(run.dit), "--predict", "x.mp4"], "--condition frames"),
            (sample.main, ["--dit", str(run.dit), "--batch", "-1"], "1 or more"),
            (nerv_vae.main, ["--resolution", "48"], "change --"), (nerv_vae.main, ["--model", "XL"], "channels"),
            (nerv_vae.main, ["--enc-heads", "5"], "divide"), (nerv_vae.main, ["--grad-accum", "0"], "--grad-accum 0"),
            (nerv_vae.main, ["--dataset", "folder", "--data-root", str(tmp_path)], "--data-root")]:
        with pytest.raises(SystemExit) as stop:
            main([*words, "--out", str(tmp_path)])
        assert part in str(stop.value.code) and "Traceback" not in str(stop.value.code)


@pytest.mark.skipif(not (FOOTAGE / "UCF-101").is_dir(), reason="no real footage beside the project")
def test_real_ucf_clips(tmp_path):
    """Catches a loader that only works on made-up files: real UCF-101 avi train for a step and sample."""
    settings = {**TINY, "dataset": "ucf", "data_root": FOOTAGE / "UCF-101", "split": "1-19", "workers": 0, "steps": 1,
                "lpips_weight": 0.0, "gan_weight": 0.0, "frames_per_step": 2}
    vae = nerv_vae.main(["--out", str(tmp_path / "vae"), *flags(settings)])
    dit_settings = {**TINY_DIT, "clips_per_video": 1, "workers": 0}
    dit = nerv_dit.main(["--vae", str(vae), "--out", str(tmp_path / "dit"), *flags(dit_settings)])
    assert len(nerv_dit.load_dit(dit, "cpu").class_names) == 26
