"""Tests of everything: contracts, known answers, wiring, behaviour, end to end. CPU, offline: pytest test_smoke.py

Each docstring names the bug that the test would catch. What needs real footage looks for it in ../shared/data and is
skipped where that is absent.
"""
import copy
import dataclasses
import gzip
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from fractions import Fraction
from functools import partial
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
        if value is True:
            words += [f"--{name}"]
        elif value is False:
            words += [f"--no-{name}"]
        else:
            words += [f"--{name}", str(value)]
    return words


def count_frames(path):
    """Number of frames that really decode."""
    return data.survey(path)["frames"]


def tiny(**changes):
    return nerv_vae.Config(**{**TINY, **changes})


def tiny_dit(**changes):
    return nerv_dit.Config(**{**TINY_DIT, **changes})


@pytest.fixture(autouse=True, scope="module")
def few_toy_videos():
    """A token cache of 96 clips is made in no time."""
    data.TOY_VIDEOS = 96


def leave_out_pictures(patch):
    """Pictures take longer than tiny training."""
    for module in (nerv_vae, nerv_dit, sample):
        patch.setattr(module, "save_video", lambda path, video, *_: None)


@pytest.fixture
def no_pictures(monkeypatch):
    leave_out_pictures(monkeypatch)


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
    model = nerv_vae.NeRVVAE(cfg)
    video = torch.rand(3, 4, 3, 32, 32) * 2 - 1
    mean, logvar = model.encode(video)
    assert mean.shape == logvar.shape == (3, 6, 8)
    recon = model.decode(mean, torch.tensor([0.0, 2.5, 9.0]))  # a subset, between two, beyond the end
    assert recon.shape == (3, 3, 3, 32, 32) and recon.abs().max() <= 1
    assert nerv_vae.Discriminator(cfg)(video).shape == (3,)
    assert generative_nerv.positional_embedding(torch.arange(5.0), 8).shape == (5, 48, 8, 8)
    dit = nerv_dit.DiT(tiny_dit(), 6, 8, classes=5)
    assert dit(mean, torch.tensor([0, 5, 999]), torch.tensor([0, 4, 5])).shape == mean.shape


def test_frames_and_videos_decode_independently():
    """Catches time mixed up with the batch, frames shuffled, and a kernel taken from another video."""
    torch.manual_seed(0)
    model = generative_nerv.GenerativeNeRV(tiny())
    z = torch.randn(3, 6, 8)
    whole = model(z, torch.arange(4.0))
    picked = model(z[[1, 0]], torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(picked, whole[[1, 0]][:, [3, 1]], rtol=1e-4, atol=1e-5)
    assert torch.pdist(whole.flatten(1)).min() > 1                      # or nothing is told apart here


def test_videos_play_in_parts():
    """Catches frames lost, doubled or shifted where a long video is decoded in parts, and memory that grows with it."""
    model = nerv_vae.NeRVVAE(tiny()).requires_grad_(False)
    z = torch.randn(2, 6, 8)
    asked = []
    model.decoder.register_forward_pre_hook(lambda _, given: asked.append((len(given[0]), len(given[1]))))
    played = model.play(z, torch.arange(10.0) / 2)
    assert asked == 2 * [(1, 4), (1, 4), (1, 2)]                        # one video, no more frames than a clip has
    torch.testing.assert_close(played, model.decode(z, torch.arange(10.0) / 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.play(z), played[:, ::2][:, :4], rtol=1e-4, atol=1e-5)


def test_cells_are_told_apart():
    """Catches time, height and width that change places, a time axis that is flipped or scaled, cells that look alike."""
    place = generative_nerv.positional_embedding(torch.tensor([0.0, 0.5, 3.0]), 8)
    sign = (-1.0) ** torch.arange(8)
    torch.testing.assert_close(place[1, 0], torch.full((8, 8), math.sin(0.5)))  # time: 1 radian a frame
    torch.testing.assert_close(place[2, 0], torch.full((8, 8), math.sin(3.0)))
    torch.testing.assert_close(place[0, 24], sign[:, None].expand(8, 8))  # height: half a turn a cell
    torch.testing.assert_close(place[1, 40], sign.expand(8, 8))
    for axis in (place[0, 16:32, :, 3], place[0, 32:, 3]):              # (16, 8): full rank, by far
        spread = torch.linalg.svdvals(axis)
        assert spread[7] > 0.4 * spread[0]


def test_patches_and_their_places():
    """Catches patches cut along the wrong axes, or in another order than the places that are added to them."""
    cfg = tiny(patch_frames=2)
    encoder = nerv_vae.NeRVEncoder(cfg)
    video = torch.rand(2, 4, 3, 32, 32)
    seen = []
    encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    encoder(video)
    patches = []
    for t in (0, 2):
        for y in (0, 8, 16, 24):
            for x in (0, 8, 16, 24):
                patches.append(video[:, t:t + 2, :, y:y + 8, x:x + 8].flatten(1))
                turn = (10.0 ** (-torch.arange(4) / 4))[:, None] * torch.tensor([t / 2, y / 8, x / 8])
                waves = torch.stack([turn.sin(), turn.cos()]).permute(2, 0, 1)  # (3, 2, 4)
                place = encoder.place[len(patches) - 1]
                torch.testing.assert_close(place, 2 * waves.flatten(), rtol=1e-4, atol=1e-5)
    expected = encoder.embed(torch.stack(patches, 1)) + encoder.place  # (2, 32, 24)
    torch.testing.assert_close(seen[0][:, :32], expected)


def test_queries_are_the_last_tokens():
    """Catches outputs taken from the patches at the front, and mean and log-variance that change places."""
    encoder = nerv_vae.NeRVEncoder(tiny()).eval()
    for layer in (encoder.blocks[0].attention.proj, encoder.blocks[0].mlp[2]):
        nerv_dit.zeroed(layer)                                          # identity: outputs are inputs
    mean, logvar = encoder(torch.rand(2, 4, 3, 32, 32))
    expected = encoder.bottleneck(encoder.norm(encoder.queries))        # (6, 16)
    torch.testing.assert_close(mean, expected[:, :8].expand(2, -1, -1))
    torch.testing.assert_close(logvar, torch.full((2, 6, 8), -5.0))     # every posterior starts equally narrow


def test_encoder_is_a_vit_over_all_places():
    """Catches a last block that skips more than what nobody reads: patches out of sight of the queries, other places."""
    torch.manual_seed(0)
    encoder = nerv_vae.NeRVEncoder(tiny(enc_depth=2)).eval()
    seen = []
    encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    mean, _ = encoder(torch.rand(2, 4, 3, 32, 32))
    x = seen[0]                                                         # (2, 38, 24)
    for block in encoder.blocks:
        x = x + block.attention(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    expected = encoder.bottleneck(encoder.norm(x[:, 32:].flatten(0, 1)))  # (12, 16)
    torch.testing.assert_close(mean, expected[:, :8].view(2, 6, 8))
    assert (mean[0] - mean[1]).abs().max() > 1e-3                       # or the queries saw nothing


def test_tokens_are_drawn_from_the_posterior():
    """Catches a variance taken for a standard deviation, and noise that is left out or drawn elsewhere."""
    model = nerv_vae.NeRVVAE(tiny()).eval()
    torch.nn.init.normal_(model.encoder.bottleneck.bias)
    video = torch.rand(2, 4, 3, 32, 32)
    noise = torch.randn(2, 6, 8)
    recon, mean, logvar = model(video, torch.tensor([2.0]), noise)
    expected = model.decoder(mean + logvar.exp().sqrt() * noise, torch.tensor([2.0]))
    torch.testing.assert_close(recon, expected)
    assert (model.decode(mean, torch.tensor([2.0])) - recon).abs().max() > 0.01


def test_checkpointing_changes_memory_only():
    """Catches gradients that differ with --checkpointing, noise drawn twice, or a decoder that renders all at once."""
    torch.manual_seed(0)
    video = torch.rand(2, 6, 3, 32, 32) * 2 - 1
    noise = torch.randn(2, 6, 8)
    plain = nerv_vae.NeRVVAE(tiny(frames=6))
    frugal = nerv_vae.NeRVVAE(tiny(frames=6, checkpointing=True))
    frugal.load_state_dict(plain.state_dict())
    asked = []
    frugal.decoder.register_forward_pre_hook(lambda _, given: asked.append(given[1].tolist()))
    for model in (plain, frugal):
        recon, mean, logvar = model(video, torch.arange(6.0), noise)
        ((recon - video).square().mean() + mean.square().mean() + logvar.square().mean()).backward()
    assert asked[:2] == [[0, 1, 2, 3], [4, 5]] and len(asked) == 4      # and again in the backward pass
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters()):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_config_becomes_a_command_line(capsys):
    """Catches a doubled default, a bool that cannot be switched off, a preset that beats a flag, a wrong exit code."""
    def parse(*words):
        return data.parse_config(nerv_vae.Config, nerv_vae.PRESETS, list(words))

    assert parse() == nerv_vae.Config()
    assert parse("--dataset", "ucf").tokens == 128 and parse("--dataset", "ucf256").tokens == 160
    cfg = parse("--dataset", "ucf", "--no-bf16", "--lr", "1", "--tokens", "3")
    assert (cfg.bf16, cfg.lr, cfg.tokens) == (False, 1.0, 3)
    for words in ("--nonsense", "--tokens x", "--tokens 0", "--lr nan", "--upsample magic", "--dataset nope"):
        with pytest.raises(SystemExit) as stop:
            parse(*words.split())
        assert stop.value.code == 2 and "usage" in capsys.readouterr().err
    for module, presets in ((nerv_vae, nerv_vae.PRESETS), (nerv_dit, nerv_dit.PRESETS), (sample, {})):
        with pytest.raises(SystemExit) as stop:
            data.parse_config(module.Config, presets, ["--help"])
        assert stop.value.code == 0 and "(default:" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- known answers: decoder

TABLE_A1 = """48,D,3,3  64,64,4,4 64,64,3,3 64,64,3,3  64,64,4,4 64,64,3,3 64,64,3,3
              64,64,4,4 64,64,3,3 128,64,3,3  64,64,4,4 64,64,3,3  D,3,3,3"""


@pytest.mark.parametrize("model, D", [("S", 128), ("B", 256), ("L", 512)])
def test_rows_are_those_of_table_a1(model, D):
    """Catches a block at the wrong channels (in and out mixed up), a wrong size, or a level that ends elsewhere."""
    plan = generative_nerv.layer_plan(nerv_vae.Config(**{**nerv_vae.PAPER, "model": model}))
    made = [f"{row.gen_in},{row.gen_out},{row.k},{row.k}" for row in plan]
    assert made == TABLE_A1.replace("D", str(D)).split()
    assert [row.c_in for row in plan] == [48] + 9 * [D] + 3 * [2 * D]
    assert [row.c_out for row in plan] == 9 * [D] + 3 * [2 * D] + [3]
    assert [row.size for row in plan] == [8] + 3 * [16] + 3 * [32] + 3 * [64] + 3 * [128]
    assert [row.grid for row in plan] == [8] + [8, 16, 16] + [16, 32, 32] + [32, 64, 64] + [64, 128, 128]
    assert [i for i, row in enumerate(plan) if row.ends_level] == [3, 6, 9, 11]


def test_blocks_of_256_are_whole_shares_of_160_tokens():
    """Catches a preset whose tokens do not divide the blocks: Appendix E.3's "simple alignment"."""
    cfg = nerv_vae.Config(**nerv_vae.PAPER_256)
    plan = generative_nerv.layer_plan(cfg)
    uneven = [row.kind for row in plan if row.gen_out * row.gen_in * row.k ** 2 % cfg.tokens]
    assert cfg.tokens == 160 and len(plan) == 16 and set(uneven) <= {"stem", "rgb"}
    assert plan[-4][:3] == ("conv", 128, 256) and plan[-4].size == 128  # the widening moved with the new level


@pytest.mark.parametrize("model, resolution, kernels", [
    ("S", 128, 3.519e6), ("B", 128, 13.953e6), ("L", 128, 55.561e6), ("L", 256, 64.474e6)])
def test_parameter_counts_are_the_papers(model, resolution, kernels):
    """Catches a block too many, a wrong width or a widening in the wrong place (paper: 3.5M, 14M, 55M, 64.5M)."""
    cfg = nerv_vae.Config(**{**nerv_vae.PAPER, "model": model, "resolution": resolution})
    with torch.device("meta"):
        net = generative_nerv.GenerativeNeRV(cfg)
    assert abs(sum(conv.shared.numel() for conv in net.convs) - kernels) < 600


def millions(net):
    return sum(p.numel() for p in net.parameters()) / 1e6


def test_other_parameter_counts():
    """Catches a changed transformer or critic: DiT-L 457.1M, encoder 177.6M, discriminator 15.3M at 16 x 128 x 128."""
    cfg = nerv_vae.Config(**nerv_vae.PAPER)
    with torch.device("meta"):
        dit = nerv_dit.DiT(nerv_dit.Config(**nerv_dit.PAPER), 128, 128, 101)
        encoder = nerv_vae.NeRVEncoder(cfg)
        critic = nerv_vae.Discriminator(cfg)
    assert abs(millions(dit) - dit.which.numel() / 1e6 - 457.1) < 0.1
    assert abs(millions(critic) - 15.3) < 0.1
    places = encoder.place.numel() / 1e6                                # fixed here, learned there
    assert abs(millions(encoder) + places - 177.6) < 0.5


def slow_kernel(conv, tokens):
    """Shared numbers plus the block that the tokens write, number by number. Shapes: (N, d) -> (c_out, c_in, k, k)."""
    kind, c_in, c_out, k, grid, size, gen_in, gen_out, _ = conv.layer
    numbers = []
    for token in tokens:
        for row in conv.head.weight:
            numbers.append(conv.scale * (row @ token))
    kernel = conv.shared.detach().clone().view(c_out, c_in, k, k)
    n = 0
    for o in range(gen_out):
        for i in range(gen_in):
            for y in range(k):
                for x in range(k):
                    kernel[o, i, y, x] += numbers[n]
                    n += 1
    for o in range(c_out):
        kernel[o] *= conv.gain / kernel[o].norm()
    return kernel


def slow_convolution(x, kernel, bias, kind, factor):
    """One video's frames through one kernel, pixel by pixel. Shapes: (T, c_in, h, w) -> (T, c_out, h', w')."""
    T, _, h, w = x.shape
    k = kernel.shape[-1]
    if kind == "transposed":            # every input paints its 4 x 4 kernel, 2 apart, 1 of a border cut off
        y = torch.zeros(T, len(kernel), 2 * h + 2, 2 * w + 2)
        for i in range(h):
            for j in range(w):
                stamp = torch.einsum("tc,ocyx->toyx", x[:, :, i, j], kernel)
                y[:, :, 2 * i:2 * i + 4, 2 * j:2 * j + 4] += stamp
        return y[:, :, 1:-1, 1:-1] + bias[:, None, None]
    if kind == "bilinear":              # between two pixels a quarter of one and three of the other
        for axis in (2, 3):
            before = torch.cat([x.narrow(axis, 0, 1), x], axis)[:, :, :x.shape[2], :x.shape[3]]
            after = torch.cat([x, x.narrow(axis, -1, 1)], axis)[:, :, -x.shape[2]:, -x.shape[3]:]
            pairs = torch.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis + 1)
            x = pairs.flatten(axis, axis + 1)
        h, w = x.shape[2:]
    padded = F.pad(x, [k // 2] * 4)
    y = torch.zeros(T, len(kernel), h, w)
    for i in range(h):
        for j in range(w):
            y[:, :, i, j] = torch.einsum("tcyx,ocyx->to", padded[:, :, i:i + k, j:j + k], kernel) + bias
    if factor == 1:
        return y
    whole = torch.zeros(T, len(kernel) // factor ** 2, factor * h, factor * w)
    for dy in range(factor):            # Table 2d: channel c * f^2 + f * dy + dx is pixel (dy, dx) of a cell
        for dx in range(factor):
            whole[:, :, dy::factor, dx::factor] = y[:, factor * dy + dx::factor ** 2]
    return whole


@pytest.mark.parametrize("kind, k, grid, size", [
    ("conv", 3, 4, 4), ("transposed", 4, 4, 8), ("bilinear", 3, 8, 8), ("rgb", 3, 4, 4), ("conv", 3, 4, 8)])
def test_modulated_convolution_is_a_loop(kind, k, grid, size):
    """Catches a block at the wrong channels, another video's tokens, a norm over the wrong axes, a wrong side."""
    torch.manual_seed(0)
    layer = generative_nerv.Layer(kind, 6, 12, k, grid, size, 2, 5)
    conv = generative_nerv.ModulatedConv2d(layer, tiny(tokens=7))
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(3, 2, 6, 4, 4)                                      # 3 videos of 2 frames
    z = torch.randn(3, 7, 8)
    found = conv(x.flatten(0, 1), z).unflatten(0, (3, 2))
    factor = size // grid if kind == "conv" else 1
    for b in range(3):
        kernel = slow_kernel(conv, z[b])
        torch.testing.assert_close(conv.kernel(z)[b], kernel, rtol=1e-4, atol=1e-5)
        expected = slow_convolution(x[b], kernel, conv.bias, kind, factor)
        torch.testing.assert_close(found[b], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind, k, grid", [("conv", 3, 8), ("conv", 1, 8), ("conv", 5, 8), ("transposed", 4, 8),
                                           ("transposed", 4, 1), ("stem", 3, 4), ("rgb", 3, 8)])
def test_gains_count_the_taps_that_are_seen(kind, k, grid):
    """Catches a gain that is not what unit scale needs: taps over the edge or between zeros, GELU's 0.4256."""
    layer = generative_nerv.Layer(kind, 1, 1, k, grid, grid, 1, 1)
    if kind == "transposed":
        layer = layer._replace(size=2 * grid)
    ones = torch.ones(1, 1, grid, grid)
    counts = generative_nerv.convolve(ones, torch.ones(1, 1, k, k), None, layer)
    seen = counts.mean().sqrt()                                         # taps along an axis, on average
    normal = torch.linspace(-8, 8, 10001, dtype=torch.float64)
    weight = torch.exp(-normal.square() / 2) / torch.exp(-normal.square() / 2).sum()
    square = {"stem": 0.5, "rgb": 1.0}.get(kind, (weight * F.gelu(normal).square()).sum())
    assert generative_nerv.unit_gain(layer) * seen / k * square ** 0.5 == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("side", ["residual", "skip", "none"])
def test_layers_are_joined_as_table_2e_says(side):
    """Catches a residual from the wrong level, a sum that is not scaled, a lost toRGB or activation."""
    torch.manual_seed(0)
    net = generative_nerv.GenerativeNeRV(tiny(side=side))
    z = torch.randn(1, 6, 8)
    frame = torch.tensor([0.0, 1.5])
    convs = [partial(conv, tokens=z) for conv in net.convs]

    def double(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear")

    def join(x, y):
        if side == "residual":
            return (x + y) / math.sqrt(2)
        return x

    x = F.gelu(convs.pop(0)(generative_nerv.positional_embedding(frame, 8)))  # (2, 8, 8, 8)
    entry = x
    x = F.gelu(convs.pop(0)(x))
    x = F.gelu(convs.pop(0)(x))
    x = F.gelu(convs.pop(0)(x))                                         # (2, 16, 16, 16): widened
    x = join(x, torch.cat([double(entry), double(entry)], 1))
    if side == "skip":
        rgb = convs.pop(0)(x)                                           # (2, 3, 16, 16)
    entry = x
    x = F.gelu(convs.pop(0)(x))
    x = F.gelu(convs.pop(0)(x))
    x = join(x, double(entry))
    x = convs.pop(0)(x)                                                 # (2, 3, 32, 32)
    if side == "skip":
        x = x + double(rgb)
    assert not convs
    torch.testing.assert_close(net(z, frame)[0], x.tanh(), rtol=1e-4, atol=1e-5)


REPEAT = dict(parameterization="repeat")
VARIANTS = [
    {}, dict(parameterization="fmm"), *[dict(expand=e, **REPEAT) for e in ("in", "out", "taps")],
    *[dict(reuse=r) for r in ("none", "direct")], dict(reuse="none", **REPEAT),
    *[dict(upsample=u, side=s) for u in ("transposed", "pixelshuffle", "bilinear")
      for s in ("residual", "skip", "none")],
    *[dict(pe_size=s) for s in (1, 4, 16)], dict(normalize=False, **REPEAT), dict(conv_init=False, **REPEAT),
    dict(model="6", gen_channels=16), dict(tokens=23, token_dim=5), dict(tokens=128),
    *[dict(degrade=d) for d in ("downsample", "blur", "inpaint")]]


@pytest.mark.parametrize("change", VARIANTS, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "default")
def test_every_tokenizer_variant(change):
    """Catches a variant whose plain CNN differs, that starts dead or exploding, or leaves parameters untrained."""
    torch.manual_seed(0)
    cfg = tiny(**{"model": "24", "gen_channels": 8, "tokens": 20, **change})
    model = nerv_vae.NeRVVAE(cfg)
    net = model.decoder
    maps = []
    for conv in net.convs:
        conv.register_forward_hook(lambda m, i, out: maps.append(out.square().mean().sqrt().item()))
    z = torch.randn(3, cfg.tokens, cfg.token_dim)
    frame = torch.tensor([0.0, 1.5, 9.0])
    videos = net(z, frame)
    assert 0.2 < min(maps) and max(maps) < 3.5
    for b in range(3):
        torch.testing.assert_close(net.instantiate(z[b])(frame), videos[b], rtol=1e-3, atol=1e-4)
    video = torch.rand(3, 4, 3, 32, 32) * 2 - 1
    before = [p.detach().clone() for p in model.parameters()]
    opts = nerv_vae.optimizers(model, dataclasses.replace(cfg, muon=True))
    recon, mean, logvar = model(data.degrade(video, cfg.degrade), torch.arange(4.0), torch.randn_like(z))
    terms = nerv_vae.vae_loss(recon, video, mean, logvar, cfg)
    terms["loss"].backward()
    for opt in opts:
        opt.step()
    assert terms["loss"].isfinite()
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(model.parameters(), before))


@pytest.mark.parametrize("mode", ["fmm", "repeat"])
def test_multiplied_kernels_start_alike(mode):
    """Catches a factor other than 1 +- 0.3: products of two small numbers are smaller still."""
    torch.manual_seed(0)
    net = generative_nerv.GenerativeNeRV(tiny(parameterization=mode, model="24", tokens=20))
    z = torch.randn(32, 20, 8)
    for conv in net.convs:
        factor = conv.modulate(z) / conv.shared.view(conv.layer.c_out, conv.layer.c_in, conv.layer.k, -1)
        assert 0.9 < factor.mean() < 1.1 and 0.2 < factor.std() < 0.4


def test_nerv_enc_preset_fits_its_kernels():
    """Catches layers that read other layers' tokens, or other sizes than the appendix's: 4x256, 128x144, 64x288, 0."""
    torch.manual_seed(0)
    cfg = nerv_vae.Config(**{**nerv_vae.NERV_ENC, "enc_depth": 1})
    net = generative_nerv.GenerativeNeRV(cfg)
    *readers, last = net.convs
    assert [conv.written for conv in readers] == [4 * 256, 128 * 144, 64 * 288] and last.head is None
    assert net.used.sum() == 37_888 and [conv.layer.c_in for conv in net.convs] == [16, 16, 32, 16]
    maps = []
    for conv in net.convs:
        conv.register_forward_hook(lambda m, i, out: maps.append(out.square().mean().sqrt().item()))
    z = torch.randn(2, cfg.tokens, cfg.token_dim)
    frame = torch.tensor([0.5])
    video = net(z, frame)
    assert video.shape == (2, 1, 3, 256, 256) and 0.2 < min(maps) and max(maps) < 3
    torch.testing.assert_close(net.instantiate(z[1])(frame), video[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(net(torch.where(net.used, z, 9.0), frame), video)  # unread, so without effect
    video.mean().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_repeated_numbers_fill_the_side_they_should():
    """Catches numbers repeated along another side than asked for (NeRV-Enc B c), or added, not multiplied."""
    layer = generative_nerv.Layer("conv", 8, 12, 3, 8, 8, 0, 0)
    for axis, expand in enumerate(("out", "in", "taps")):
        conv = generative_nerv.RepeatConv2d(layer, tiny(expand=expand, **REPEAT))
        ratio = conv.modulate(torch.randn(2, 6, 8)) / conv.modulate(torch.zeros(2, 6, 8))
        ratio = ratio.flatten(3)                                        # (2, 12, 8, 9)
        for other in range(3):
            runs = ratio.unfold(other + 1, 4, 4).flatten(0, -2)         # four neighbours along each side
            assert bool((runs - runs[:, :1]).abs().max() < 1e-4) == (other == axis)


def test_rows_of_tokens_without_reuse():
    """Catches tokens that two layers share, or that none reads, where Table 2b has no reuse."""
    net = generative_nerv.GenerativeNeRV(tiny(reuse="none", tokens=40))
    ends = [conv.rows.stop for conv in net.convs]
    assert [conv.rows.start for conv in net.convs] == [0] + ends[:-1] and ends[-1] == 40
    counts = [conv.rows.stop - conv.rows.start for conv in net.convs]
    sizes = [conv.written for conv in net.convs]
    assert min(counts) >= 1 and counts.index(max(counts)) == sizes.index(max(sizes))


def test_autocast_reaches_the_whole_decoder():
    """Catches a float32 scale, bias or sum that makes feature maps float32 again: slower, and twice the memory."""
    torch.manual_seed(0)
    decoder = generative_nerv.GenerativeNeRV(tiny())
    z = torch.randn(2, 6, 8)
    frame = torch.arange(3.0)
    plain = decoder.instantiate(z[0])
    with torch.no_grad():
        exact = plain(frame)
        for net in (decoder, plain):
            types = []
            for conv in net.convs:
                conv.register_forward_hook(lambda _, given, y: types.extend([*[x.dtype for x in given], y.dtype]))
            with torch.autocast("cpu", torch.bfloat16):
                out = decoder(z[:1], frame)[0] if net is decoder else plain(frame)
            assert types[1:] == [torch.bfloat16] * (2 * len(net.convs) - 1)  # 0: the sinusoids
            assert (out - exact).square().mean() < 0.05 ** 2 * exact.square().mean()


def test_interpolated_tokens_are_interpolated_kernels():
    """Catches a non-linear step between tokens and kernels, which would break weight interpolation (Sec. 4.5.2)."""
    conv = generative_nerv.GenerativeNeRV(tiny()).convs[3]
    a = torch.randn(1, 6, 8)
    b = torch.randn(1, 6, 8)
    mixed = 0.3 * conv.modulate(a) + 0.7 * conv.modulate(b)
    torch.testing.assert_close(conv.modulate(0.3 * a + 0.7 * b), mixed)


# ---------------------------------------------------------------------------------------------- known answers: losses

def test_learning_rate_rises_and_falls_to_zero():
    """Catches a warmup that is off by one, a peak that is not lr, and a cosine that does not reach zero."""
    cfg = tiny(lr=0.5, warmup=10, steps=110)
    found = [nerv_vae.learning_rate(step, cfg) for step in (0, 4, 9, 10, 35, 60, 109, 110)]
    quarter = 0.25 + 0.125 * math.sqrt(2)
    assert found[:6] == pytest.approx([0.05, 0.25, 0.5, 0.5, quarter, 0.25])
    assert found[6] < 2e-4 and found[7] == pytest.approx(0, abs=1e-12)  # the last step, and one more


def test_edge_error_of_a_slope():
    """Catches a direction left out, and a brightness that counts."""
    down, across = torch.meshgrid(torch.arange(6.0), torch.arange(5.0), indexing="ij")
    target = torch.randn(2, 4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    recon = target + 0.3 * down - 0.1 * across + 7                      # (B, k, 3, H, W)
    assert nerv_vae.edge_error(recon, target).item() == pytest.approx(0.3 ** 2 + 0.1 ** 2, rel=1e-4)


def test_kl_matches_torch():
    """Catches a lost half or a swapped sign in the KL term."""
    mean = torch.randn(4, 5, 6)
    logvar = torch.randn(4, 5, 6)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(nerv_vae.kl_divergence(mean, logvar), expected)


def test_gan_losses_pull_in_opposite_directions():
    """Catches the generator's loss with the critic's sign, and a critic that is rewarded for its mistakes."""
    def critic(video):                                                  # believes what is bright
        return video.mean((1, 2, 3, 4))

    dark = torch.full((2, 4, 3, 8, 8), -3.0, requires_grad=True)
    bright = torch.full((2, 4, 3, 8, 8), 3.0, requires_grad=True)
    nerv_vae.generator_loss(critic, dark).backward()
    assert dark.grad.max() < 0                                          # it learns to be brighter
    right = nerv_vae.critic_loss(critic, bright, dark)
    wrong = nerv_vae.critic_loss(critic, dark, bright)
    assert right["loss_d"].item() == pytest.approx(2 * math.log1p(math.exp(-3)))
    assert wrong["loss_d"].item() == pytest.approx(2 * math.log1p(math.exp(3)))
    dark.grad = None
    right["loss_d"].backward()
    assert dark.grad is None and (right["d_real"], right["d_fake"]) == (3, -3)  # fakes are not trained by it


def test_min_snr_weight():
    """Catches the weight of a data prediction used on a noise prediction (paper A.1: adjusted)."""
    snr = torch.tensor([1e-4, 1.0, 5.0, 10.0, 1000.0])
    expected = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.005])
    torch.testing.assert_close(nerv_dit.min_snr_weight(snr, 5.0), expected)
    assert (nerv_dit.min_snr_weight(snr, 0.0) == 1).all()


# ---------------------------------------------------------------------------------------------- known answers: samplers

class OnePoint(torch.nn.Module):
    """The exact denoiser of a data set with a single point, of its mirror image for label 1, of 0 for label 2."""

    by_class = True
    classes = 2
    token_mean = 0.0
    token_std = 1.0
    noise_in = nerv_dit.DiT.noise_in
    forward = nerv_dit.DiT.forward

    def __init__(self, point, predict="noise"):
        super().__init__()
        self.point = point
        self.cfg = SimpleNamespace(predict=predict)
        self.schedule = nerv_dit.noise_schedule()
        self.alpha, self.sigma = self.schedule

    def steer(self, t, cond):
        return torch.stack(torch.broadcast_tensors(t, cond), -1)[..., None]     # (B, 2, 1) or (S, B, 2, 1)

    def denoise(self, z, steering, cond):
        t, label = steering[..., 0].T
        sign = torch.tensor([1.0, -1.0, 0.0])[label][:, None, None]
        alpha = self.alpha[t][:, None, None]
        sigma = self.sigma[t][:, None, None]
        noise = (z - alpha * self.point * sign) / sigma
        return noise if self.cfg.predict == "noise" else alpha * noise - sigma * self.point * sign


@pytest.mark.parametrize("predict", ["noise", "velocity"])
@pytest.mark.parametrize("sampler, steps", [("ddpm", 250), ("ddpm", 3), ("ddim", 50), ("ddim", 2)])
def test_samplers_find_the_known_point(sampler, steps, predict):
    """Catches a flipped time axis, an off-by-one step or a wrong posterior: with one data point the noise is known."""
    point = torch.randn(1, 4, 8)
    cond = torch.tensor([0, 1, 1])
    found = nerv_dit.sample_tokens(OnePoint(point, predict), cond, torch.randn(3, 4, 8), sampler, steps)
    torch.testing.assert_close(found, torch.cat([point, -point, -point]), rtol=1e-3, atol=1e-3)
    assert torch.equal(cond, torch.tensor([0, 1, 1]))


def test_guidance_acts_on_all_channels():
    """Catches DiT's known slip, guidance on the first channels only, a swapped sign, and a wrong "no class"."""
    point = torch.ones(1, 2, 8)                         # label 0 pulls to 1, none to 0, so 3 times guided to 3
    noise = torch.randn(2, 2, 8)
    found = nerv_dit.sample_tokens(OnePoint(point), torch.tensor([0, 1]), noise, "ddim", 20, guidance=3.0)
    torch.testing.assert_close(found, torch.cat([3 * point, -3 * point]), rtol=1e-3, atol=1e-3)


def test_a_video_does_not_depend_on_its_batch():
    """Catches noise drawn for a batch as a whole, and fresh noise that repeats what a video started from."""
    model = OnePoint(torch.zeros(1, 4, 8))
    model.sigma = model.sigma * 2                       # a denoiser that is wrong, so that noise stays
    start = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    noise = torch.stack(start)
    walks = []
    for first, last in ((0, 3), (0, 1), (1, 3)):
        cond = torch.zeros(last - first, dtype=torch.long)
        walks.append(nerv_dit.sample_tokens(model, cond, noise[first:last], "ddpm", 10, seed=first))
    torch.testing.assert_close(walks[0], torch.cat(walks[1:]))
    fresh = nerv_dit.noise_of(2 ** 31, 3, (10, 4, 8))  # (3, 10, 4, 8)
    assert torch.pdist(torch.cat([noise[:, None], fresh], 1).flatten(0, 1).flatten(1)).min() > 1


def awake(condition="class", **settings):
    """A denoiser with random gates, as those of a new one are shut, and with token statistics that are not 0 and 1."""
    torch.manual_seed(0)
    model = nerv_dit.DiT(tiny_dit(condition=condition, **settings), 6, 8, classes=3)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    torch.nn.init.normal_(model.token_mean)
    torch.nn.init.uniform_(model.token_std, 0.5, 2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("backbone", ["dit", "gpt", "latte"])
@pytest.mark.parametrize("condition, guidance, sampler", [
    ("class", 3.0, "ddpm"), ("class", 1.0, "ddim"), ("none", 1.0, "ddim"), ("edge", 1.0, "ddpm")])
def test_steering_made_ahead_is_a_plain_loop(condition, guidance, sampler, backbone):
    """Catches times and labels paired wrongly where ten steps are steered at once, and a condition scaled twice."""
    model = awake(condition, backbone=backbone)
    labels = torch.tensor([2, 0, 1, 2])
    if condition == "none":
        labels = torch.full((4,), 3)
    given = torch.randn(4, 6, 8)
    times = np.linspace(999, 0, 13).round().astype(int)
    alpha, sigma = nerv_dit.noise_schedule()
    alpha = torch.cat([alpha[times], torch.ones(1)])                    # the last step ends at the data
    sigma = torch.cat([sigma[times], torch.zeros(1)])
    for batch in (1, 4):
        noise = torch.randn(batch, 6, 8)
        cond = given[:batch] if condition == "edge" else labels[:batch]
        z = noise
        fresh = nerv_dit.noise_of(2 ** 31 + 5, batch, (13, 6, 8))
        for i in range(13):
            a, a2 = alpha[i:i + 2]
            s, s2 = sigma[i:i + 2]
            t = torch.full((batch,), int(times[i]))
            eps = model(z, t, cond)
            if guidance != 1:
                none = model(z, t, torch.full_like(cond, 3))
                eps = none + guidance * (eps - none)
            if sampler == "ddpm":
                z = nerv_dit.ancestral_step(z, eps, (a, s), (a2, s2), fresh[:, i])
            else:
                z = a2 * (z - s * eps) / a + s2 * eps
        z = z * model.token_std + model.token_mean
        found = nerv_dit.sample_tokens(model, cond, noise, sampler, 13, guidance, seed=5)
        torch.testing.assert_close(found, z, rtol=1e-3, atol=1e-3 * z.abs().max().item())


def test_a_velocity_stands_for_noise():
    """Catches a sign, a factor or a time of its own in the velocity, which the presets for small machines predict."""
    model = awake(predict="velocity")
    t = torch.tensor([3, 500, 999])
    kept = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000), 0)[t, None, None]
    tokens = torch.randn(3, 6, 8)
    noise = torch.randn(3, 6, 8)
    model.denoise = lambda *inputs: kept.sqrt() * noise - (1 - kept).sqrt() * tokens
    found = model(kept.sqrt() * tokens + (1 - kept).sqrt() * noise, t, torch.tensor([0, 1, 3]))
    torch.testing.assert_close(found, noise, rtol=1e-4, atol=1e-4)


def test_every_step_of_a_walk_is_yielded():
    """Catches a walk that yields normalised tokens, a step to the wrong time, or not every step."""
    model = awake()
    model.token_mean.fill_(7)
    noise = torch.randn(2, 6, 8)
    cond = torch.tensor([0, 2])
    walk = list(nerv_dit.denoise_steps(model, cond, noise, "ddim", 5))
    eps = model(noise, torch.tensor([999, 999]), cond)
    alpha, sigma = nerv_dit.noise_schedule()
    aim = (noise - sigma[999] * eps) / alpha[999]
    z = alpha[749] * aim + sigma[749] * eps             # 999, 749, 500, 250, 0
    z = z * model.token_std + model.token_mean
    torch.testing.assert_close(walk[0], z, rtol=1e-3, atol=1e-3 * z.abs().max().item())
    assert len(walk) == 5
    assert torch.equal(walk[-1], nerv_dit.sample_tokens(model, cond, noise, "ddim", 5))


def test_conditions_are_normalised_once():
    """Catches a condition that a caller has to scale, is scaled twice, or not at all."""
    model = awake("frames")
    cond = torch.randn(2, 6, 8)
    z = torch.randn(2, 6, 8)
    t = torch.tensor([5, 700])
    found = model(z, t, cond)
    scaled = (cond - model.token_mean) / model.token_std
    model.token_mean.zero_()
    model.token_std.fill_(1)
    torch.testing.assert_close(model(z, t, scaled), found)
    plain, guided = [nerv_dit.sample_tokens(model, cond, z, steps=3, guidance=scale) for scale in (1.0, 2.0)]
    assert torch.equal(plain, guided)                   # there is no class to exaggerate


@pytest.mark.parametrize("backbone", ["dit", "gpt", "latte"])
@pytest.mark.parametrize("condition", ["class", "frames"])
def test_every_denoiser_trains_everywhere(backbone, condition):
    """Catches a layer that the loss does not reach. Rows of classes that are not in the batch get none, rightly."""
    model = awake(condition, backbone=backbone).requires_grad_(True)
    tokens = torch.randn(4, 6, 8)
    noise = torch.randn(2, 4, 6, 8)
    cond = torch.tensor([0, 1, 2, 3]) if condition == "class" else torch.randn(4, 6, 8)
    t = torch.tensor([1, 9, 400, 999])
    nerv_dit.diffusion_loss(model, tokens, noise, t, cond, nerv_dit.noise_schedule(), 5.0, twice=True).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_new_block_is_the_identity():
    """Catches adaLN-Zero gates that do not start shut, and shift, scale or gate that change places."""
    block = nerv_dit.DiTBlock(8, nerv_vae.Attention(8, 2))
    x = torch.randn(2, 5, 8)
    assert not block.adaln(torch.randn(2, 8)).any()
    told = torch.randn(2, 6, 8)
    y = F.layer_norm(x, [8], eps=1e-6)
    y = x + told[:, 2:3] * block.attention(y * (1 + told[:, 1:2]) + told[:, 0:1])
    expected = y + told[:, 5:] * block.mlp(F.layer_norm(y, [8], eps=1e-6) * (1 + told[:, 4:5]) + told[:, 3:4])
    torch.testing.assert_close(block(x, told), expected)


def test_loss_is_zero_for_the_exact_denoiser_and_in_both_passes():
    """Catches a loss and a sampler that disagree on time, and a second pass whose target forgets the true tokens."""
    point = torch.randn(1, 4, 8)
    schedule = nerv_dit.noise_schedule()
    t = torch.tensor([1, 300, 999])
    for twice in (False, True):
        noise = torch.randn(2, 3, 4, 8)
        loss = nerv_dit.diffusion_loss(OnePoint(point), point.expand(3, -1, -1), noise, t, torch.zeros(3).long(),
                                       schedule, 5.0, twice)
        assert loss < 1e-6
    assert schedule[0][0] > 0.99 and schedule[0][999] < 0.01            # 0 is almost data, 999 almost noise


def test_ancestral_step_has_the_posterior_of_gaussians():
    """Catches a wrong mean or variance: z_now, z_then are jointly Gaussian given the data, so Bayes' rule is exact."""
    alpha, sigma = (c.double() for c in nerv_dit.noise_schedule())
    now = 400
    then = 380
    point = 0.7
    z = torch.tensor(0.3, dtype=torch.float64)
    ratio = alpha[now] / alpha[then]
    noise_between = sigma[now] ** 2 - ratio ** 2 * sigma[then] ** 2
    precision = 1 / sigma[then] ** 2 + ratio ** 2 / noise_between
    mean = (alpha[then] * point / sigma[then] ** 2 + ratio * z / noise_between) / precision
    eps = (z - alpha[now] * point) / sigma[now]
    pairs = [(alpha[i], sigma[i]) for i in (now, then)]
    got = nerv_dit.ancestral_step(z, eps, *pairs, torch.tensor(0.0))
    spread = nerv_dit.ancestral_step(z, eps, *pairs, torch.tensor(1.0)) - got
    torch.testing.assert_close(got, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(spread, precision ** -0.5, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- learning

def test_overfits_one_clip(no_pictures, tmp_path):
    """Catches a decoder or loss that cannot learn: one clip has to come close in a few steps."""
    settings = {**TINY, "overfit": True, "model": "16", "gen_channels": 16, "steps": 80, "lr": 1e-2, "batch": 1,
                "kl_weight": 0.0, "frames_per_step": 4, "ema": 0.9, "warmup": 10, "eval_every": 80, "log_every": 80}
    nerv_vae.main(["--out", str(tmp_path), *flags(settings)])
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert row["psnr_train"] > 22


def test_averaged_weights_are_what_is_loaded(run):
    """Catches sampling with raw weights: after training, load_vae and load_dit must return the averaged ones."""
    for load, path in ((nerv_vae.load_vae, run.vae), (nerv_dit.load_dit, run.dit)):
        ckpt = torch.load(path, weights_only=True)
        model = load(path, "cpu")
        state = model.state_dict()
        assert state.keys() == ckpt["ema"].keys() and not model.training
        assert all(torch.equal(state[k], v) for k, v in ckpt["ema"].items())
        assert any(not torch.equal(ckpt["model"][k], v) for k, v in ckpt["ema"].items())


def test_averages_move_towards_the_new_weights():
    """Catches an average that moves the wrong way, or that keeps the untrained start for long."""
    old = torch.nn.Linear(2, 2)
    new = torch.nn.Linear(2, 2)
    for step, kept in ((10_000, 0.9), (0, 0.1)):
        expected = kept * old.weight.detach() + (1 - kept) * new.weight.detach()
        nerv_vae.update_ema(old, new, 0.9, step)
        torch.testing.assert_close(old.weight.detach(), expected)




# ------------------------------------------------------------------------------------------ data

def write_clip(path, count=12, size=(48, 64), codec="libx264", pixels="yuv420p", gop=12, stamps=None, sar=None,
               **container):
    """A clip whose left half has grey level 20 k in frame k, and whose right half is white. Returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", **container) as file:
        stream = file.add_stream(codec, rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.gop_size = gop
        if sar:
            stream.codec_context.sample_aspect_ratio = sar
        for k in range(count):
            picture = np.full((*size, 3), 255, np.uint8)
            picture[:, :size[1] // 2] = 20 * k % 256
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts = stamps[k] if stamps else k
            frame.time_base = Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path.read_bytes()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two classes of little videos in several containers, whose frame k has grey level 8 k; and some bad files."""
    root = tmp_path_factory.mktemp("videos")
    frames = np.arange(0, 160, 8, dtype=np.uint8).repeat(48 * 64 * 3).reshape(20, 48, 64, 3)
    names = ["a/v_A_g01_c01.avi", "a/v_A_g09_c01.mp4", "b/deep/v_B_g02_c01.mkv", "b/deep/v_B_g10_c01.mov"]
    (root / "b/deep").mkdir(parents=True)
    (root / "a").mkdir()
    for name in names:
        codec = "mpeg4" if name.endswith("avi") else "libx264"
        iio.imwrite(root / name, frames, plugin="pyav", codec=codec, fps=25, in_pixel_format="rgb24")
    iio.imwrite(root / "b/deep/one.gif", frames, duration=40, loop=0)
    whole = (root / names[0]).read_bytes()
    (root / "a/empty.mp4").write_bytes(b"")
    (root / "a/text.avi").write_text("not a video")
    (root / "a/cut.avi").write_bytes(whole[:len(whole) // 4])
    return root


def folder_config(tree, tmp_path, **changes):
    settings = dict(dataset="folder", data_root=str(tree), out=str(tmp_path / "out"), split="all", frames=4, stride=1,
                    resolution=32, flip=True, seed=0)
    return SimpleNamespace(**{**settings, **changes})


@pytest.fixture
def full_disk():
    """full_disk(n): no file grows beyond n bytes; full_disk() lifts it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(most=before[0]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))

    yield limit
    limit()


def one_line(call, *words, **named):
    """The one line with which `call` ends the program."""
    with pytest.raises(SystemExit) as stop:
        call(*words, **named)
    assert "\n" not in str(stop.value.code)
    return str(stop.value.code)


@pytest.mark.parametrize("words", ["--nonsense", "--frames x", "--frames 0", "--stride -1", "--seed -1",
                                   "--seed 4294967296", "--dataset nope", "--frames", "--seed nan"])
def test_bad_values_exit_with_two(words, capsys):
    """Catches a value that nobody checks: seeds of 64 bits, no frames, steps backwards (a traceback much later)."""
    with pytest.raises(SystemExit) as stop:
        data.parse_config(data.Config, {}, words.split())
    told = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and len(told) == 2 and told[0].startswith("usage") and "error" in told[1]


def test_numbers_are_finite_and_in_their_range(capsys):
    """Catches nan and inf as a rate, and an open range that refuses large numbers."""
    good = data.parse_config(LikeAConfig, {}, ["--rate", "0.5", "--steps", str(10 ** 12)])
    assert (good.rate, good.steps) == (0.5, 10 ** 12)
    for words in (["--rate", "nan"], ["--rate", "inf"], ["--share", "nan"], ["--share", "1.01"], ["--steps", "-1"]):
        with pytest.raises(SystemExit):
            data.parse_config(LikeAConfig, {}, words)


@dataclasses.dataclass
class LikeAConfig:
    rate: float = 1.0               # 0..: any finite number
    share: float = 0.5              # 0..1: of all
    steps: int = 0                  # 0..: how many


def test_frame_k_is_frame_k(tree):
    """Catches a seek that lands beside the frame asked for, in every container."""
    for path in sorted(tree.rglob("v_*")) + [tree / "b/deep/one.gif"]:
        assert count_frames(path) == 20, path
        for start in (0, 7, 16):
            clip = data.read_clip(path, start, 2, 3, 32)                            # frames start, start + 3
            level = (clip.mean((1, 2, 3)) + 1) * 127.5
            assert (level - 8 * torch.tensor([start, start + 3.0])).abs().max() < 3, path
    with pytest.raises(ValueError, match="cannot read frames"):
        data.read_clip(tree / "a/v_A_g01_c01.avi", 18, 4, 1, 32)


@pytest.mark.parametrize("name, codec", [("x.mp4", "libx264"), ("x.mkv", "libx264"), ("x.mov", "mpeg4"),
                                         ("x.avi", "mpeg4"), ("x.webm", "libvpx-vp9")])
def test_seeking_is_exact(tmp_path, name, codec):
    """Catches a seek to a wrong frame, and pixels that depend on where decoding began."""
    path = tmp_path / name
    write_clip(path, 50, codec=codec)
    found = data.survey(path)
    keys = found["keys"]
    whole = data.read_frames(path, range(50), 32)
    assert found["frames"] == 50 and len(keys) >= 4 and not found["error"]
    assert len({frame.numpy().tobytes() for frame in whole}) > 12
    for start in range(0, 47, 3):
        assert torch.equal(data.read_frames(path, range(start, start + 4), 32, keys), whole[start:start + 4])
    stamp = keys[2][1]
    assert next(data.decode(path, [], stamp))[0].pts == stamp                       # it did seek ..
    for wrong in (-5, 10 ** 9):                                                     # .. and else starts over
        assert torch.equal(data.read_frames(path, [30, 33], 32, [[0, None], [24, wrong]]), whole[[30, 33]])


@pytest.mark.parametrize("codec, name", [("libx265", "x.mp4"), ("libx264", "x.mov"), ("mpeg4", "x.avi")])
def test_a_damaged_packet_costs_its_own_frames(tmp_path, codec, name):
    """Catches a whole film lost for twelve bytes, and frames renumbered by where decoding began."""
    path = tmp_path / name
    whole = write_clip(path, 48, codec=codec)
    before = data.read_frames(path, range(10), 32)
    with av.open(str(path)) as file:
        packet = [packet for packet in file.demux(video=0) if packet.size][29]
    place = packet.pos + packet.size // 2
    path.write_bytes(whole[:place] + bytes([255] * 12) + whole[place + 12:])
    found = data.survey(path)
    assert 46 <= found["frames"] <= 48
    every = data.read_frames(path, range(found["frames"]), 32)
    assert torch.equal(every[:10], before)
    tail = range(found["frames"] - 4, found["frames"])
    assert torch.equal(data.read_frames(path, tail, 32, found["keys"]), every[-4:])


def test_bad_files_are_skipped_counted_and_named(tree, tmp_path, capsys):
    """Catches a broken file that ends a run or shifts the labels, and a list of videos that is not used again."""
    videos = data.build_dataset(folder_config(tree, tmp_path))
    told = capsys.readouterr().out
    assert ("left out 2 unreadable" in told or "left out 3 unreadable" in told) and "a/text.avi" in told
    assert len(videos) == 5 + ("2 unread" in told) and videos.classes == ["a", "deep"]
    assert [videos.classes[i] for i in videos.labels] == [p.parent.name for p in videos.files]
    index = data.read_checked(tmp_path / "out/index.json")
    assert len(index) == 8 and index["a/text.avi"]["error"] and index["a/text.avi"]["frames"] == 0
    write_clip(tmp_path / "other/x.mp4")
    data.build_dataset(folder_config(tmp_path / "other", tmp_path))
    assert len(data.read_checked(tmp_path / "out/index.json")) == 9                 # another folder wipes nothing out


@pytest.mark.parametrize("damage", ["", "[1", "null", '{"a": 1}', "altered"])
def test_a_damaged_index_is_refused(tmp_path, damage):
    """Catches frame counts believed from an index that is empty, cut off, somebody else's or altered."""
    write_clip(tmp_path / "d/a/x.mp4")
    cfg = folder_config(tmp_path / "d", tmp_path)
    assert data.build_dataset(cfg).found[0]["frames"] == 12
    path = tmp_path / "out/index.json"
    if damage == "altered":
        damage = path.read_text().replace('"frames": 12', '"frames": 99')
    path.write_text(damage)
    assert "move it away" in one_line(data.build_dataset, cfg)
    assert path.read_text() == damage                   # perhaps somebody else's


def bad_files(folder):
    """28 kinds of file that no run can use, in `folder`."""
    kinds = [("mp4", "libx264"), ("mov", "libx264"), ("avi", "mpeg4"), ("mkv", "libx264"), ("webm", "libvpx-vp9")]
    whole = {kind: write_clip(folder / f"cut.{kind}", codec=codec) for kind, codec in kinds}
    iio.imwrite(folder / "cut.gif", np.arange(12, dtype=np.uint8).repeat(48 * 64 * 3).reshape(12, 48, 64, 3) * 20)
    whole["gif"] = (folder / "cut.gif").read_bytes()
    for kind, content in whole.items():                                             # 1-6: truncated
        (folder / f"cut.{kind}").write_bytes(content[:len(content) * 2 // 5])
    mp4 = whole["mp4"]
    noise = np.random.default_rng(0).bytes(4000)
    image = np.zeros((48, 64, 3), np.uint8)
    raw = write_clip(folder / "raw.avi", codec="rawvideo", pixels="bgr24")
    size = raw.index(b"strf") + 12
    huge = np.array([60000, 60000], "<i4").tobytes()
    contents = {                                                                    # 7-20
        "empty.mp4": b"", "empty.avi": b"", "text.avi": b"not a video", "page.webm": b"<html>404 Not Found</html>",
        "list.mp4": b"#EXTM3U\n#EXTINF:2,\nhttp://127.0.0.1:9/x.ts\n", "chain.mov": b"ffconcat version 1.0\nfile a",
        "noise.mkv": noise, "zeros.avi": bytes(4000), "tail.mp4": mp4[len(mp4) // 2:],
        "index.mp4": mp4.replace(b"moov", b"xxxx"), "picture.mp4": iio.imwrite("<bytes>", image, extension=".png"),
        "photo.avi": iio.imwrite("<bytes>", image, extension=".jpg"), "raw.avi": raw[:size] + huge + raw[size + 8:],
        "wide.gif": whole["gif"][:6] + b"\xe0\x2e\xe0\x2e" + whole["gif"][10:]}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    write_clip(folder / "one.mp4", 1)                                               # 21
    write_clip(folder / "one.gif", 1, codec="gif", pixels="rgb8")                   # 22
    write_clip(folder / "seven.mkv", 7)                                             # 23: one too few
    for name, codec in (("sound.mp4", "aac"), ("sound.avi", "pcm_s16le")):          # 24, 25
        with av.open(str(folder / name), "w") as file:
            stream = file.add_stream(codec, rate=8000)
            kind = np.float32 if codec == "aac" else np.int16
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), kind), layout="mono",
                                               format="fltp" if codec == "aac" else "s16")
            sound.sample_rate = 8000
            file.mux(stream.encode(sound))
            file.mux(stream.encode())
    (folder / "dangling.mp4").symlink_to("nowhere.mp4")                             # 26
    (folder / "itself.mp4").symlink_to("itself.mp4")                                # 27
    os.mkfifo(folder / "pipe.mp4")                                                  # 28
    (folder / "loop").symlink_to("..")


def test_many_bad_files_beside_good_ones(tmp_path, capsys):
    """Catches a hostile file that ends, hangs or bloats a run or shifts the labels, and odd good ones read wrongly."""
    root = tmp_path / "tree"
    bad_files(root / "broken")
    write_clip(root / "a/plain.mp4")
    write_clip(root / "a/odd.mkv", size=(47, 63), pixels="yuv444p")
    write_clip(root / "a/large.mp4", 8, size=(2160, 3840))
    write_clip(root / "a/rates.mp4", stamps=[k * k for k in range(12)])
    write_clip(root / "b.avi/deep.mkv", codec="ffv1", pixels="yuv420p10le")         # a folder called like a video
    write_clip(root / "b.avi/grey.mkv", codec="ffv1", pixels="gray")
    write_clip(root / "c/alpha.mov", codec="qtrle", pixels="argb")
    write_clip(root / "c/it's \"a\"\nnew: é 漢 %03d.mp4")
    write_clip(root / "c/name.avi", codec="mpeg4")
    os.rename(root / "c/name.avi", os.fsencode(root) + b"/c/\xff.avi")
    both = [write_clip(root / "d/grows.mp4", size=s, format="h264") for s in ((48, 64), (64, 96))]
    (root / "d/grows.mp4").write_bytes(b"".join(both))                              # changes its size on the way
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cfg = folder_config(root, tmp_path, frames=8, flip=False)
    videos = data.build_dataset(cfg)
    assert "28 unreadable" in capsys.readouterr().out
    assert [videos.classes[i][0] for i in videos.labels] == list("aaaabbcccd")
    index = data.read_checked(tmp_path / "out/index.json")
    refused = {name for name, found in index.items() if found["frames"] < 8}
    assert len(index) == 38 and len(refused) == 28 and all(name.startswith("broken/") for name in refused)
    for i, path in enumerate(videos.files):
        clip, label = videos[i, i]
        dark = (clip[..., 8:24, 2:8].mean((1, 2, 3)) + 1) * 127.5                   # (T,)
        steps = dark.diff()
        assert clip.shape == (8, 3, 32, 32) and label == videos.labels[i], path
        assert ((steps - 20).abs() < 4).sum() >= 6 and clip[..., -6:].mean() > 0.95, (path, dark)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6, "more than 1 GB"
    assert data.build_dataset(cfg).files == videos.files                            # from the index, odd names included


def test_what_a_tree_holds(tmp_path, capsys):
    """Catches hidden and linked folders, our own pictures and other suffixes read or left out without a word."""
    root = tmp_path / "d"
    clip = write_clip(root / "a/1.mp4")
    for suffix in ("mkv", "mpg", "ts", "flv", "wmv", "m4v"):
        codec = {"mpg": "mpeg2video", "flv": "flv", "wmv": "wmv2"}.get(suffix, "libx264")
        write_clip(root / f"kinds/x.{suffix}", codec=codec, gop=4)
    hidden = [".ipynb_checkpoints/1.mp4", "a/._1.mp4", "__MACOSX/1.mp4", "$Recycle.Bin/1.mp4", "@eaDir/1.mp4"]
    for name in hidden:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(clip)
    write_clip(tmp_path / "elsewhere/1.mp4")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a/up").symlink_to(root)                    # a loop
    (root / "a/notes.txt").write_text("")
    (root / "short").mkdir()
    write_clip(root / "short/1.mp4", 2)
    data.save_video(root / "run/000_a.mp4", torch.zeros(12, 3, 32, 32))
    data.save_video(root / "run/000_a.gif", torch.rand(12, 3, 32, 32))
    for name in ("e\u0301", "\u00e9"):                  # one name in two Unicode forms
        write_clip(root / name / "1.mp4")
    videos = data.build_dataset(folder_config(root, tmp_path))
    told = capsys.readouterr().out
    assert videos.classes == ["a", "kinds", "linked", "\u00e9"]
    assert np.bincount(videos.labels).tolist() == [1, 6, 1, 2] and told.count("\n") == 5
    for part in ("6 hidden", "2 written by a run", "1 .txt files: ['notes.txt']", "1 unreadable or shorter", "1 folders linked"):
        assert part in told


def test_a_class_exists_where_a_clip_of_it_trains(tree, tmp_path):
    """Catches a class without training clips that is sampled, and held-out labels that are numbered otherwise."""
    for group, name in ((1, "only"), (2, "z"), (9, "z"), (9, "last")):
        write_clip(tmp_path / f"d/{name}/v_X_g{group:02d}_c01.mp4")
    cfg = folder_config(tmp_path / "d", tmp_path, split="8-25")
    train = data.build_dataset(cfg)
    held = data.build_dataset(cfg, held_out=True)
    assert train.classes == held.classes == ["last", "z"]
    assert train.labels.tolist() == [0, 1] and held.labels.tolist() == [1]


def test_split_keeps_groups_apart(tree, tmp_path):
    """Catches a split by clip, which leaks: clips of one group are cut from one source video; and groups that are not."""
    cfg = folder_config(tree, tmp_path, split="train")
    groups = []
    for held_out in (False, True):
        files = data.build_dataset(cfg, held_out).files
        groups.append({data.group_of(str(path.relative_to(tree))) for path in files})
    assert not groups[0] & groups[1] and {9, 10} <= groups[0] and {1, 2} <= groups[1]
    assert data.split_groups("1-3,7") == {1, 2, 3, 7} and len(data.split_groups("all")) == 25
    for wrong in ("0", "26", "9-3", "1-30", "", "1,,2", "\u00b3", "-1", "1-2-3"):
        assert "--split" in one_line(data.split_groups, wrong)


def test_a_clip_looks_as_in_a_player(tmp_path):
    """Catches films that lie on their side, mirrored selfies, squeezed DVDs, and a cover picture in a film's place."""
    path = tmp_path / "x.mp4"
    whole = write_clip(path, size=(64, 64))
    plain = data.read_clip(path, 0, 4, 1, 32)
    place = whole.index(b"tkhd") + 44                   # the display matrix
    turns = {(0, 1, -1, 0): plain.rot90(-1, (2, 3)), (-1, 0, 0, -1): plain.flip(2, 3), (0, -1, 1, 0):
             plain.rot90(1, (2, 3)), (-1, 0, 0, 1): plain.flip(3), (0, 1, 1, 0): plain.transpose(2, 3)}
    for (a, b, c, d), expected in turns.items():
        matrix = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
        path.write_bytes(whole[:place] + matrix + whole[place + 36:])
        assert (data.read_clip(path, 0, 4, 1, 32) - expected).abs().max() < 0.2, (a, b, c, d)
    write_clip(tmp_path / "wide.mp4", size=(64, 32), sar=Fraction(4, 1))            # 128 x 64 as it is shown
    wide = data.read_clip(tmp_path / "wide.mp4", 0, 1, 1, 32)[0, 0, 16]
    assert (wide[:14] < -0.9).all() and (wide[18:] > 0.9).all()
    black = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
    with av.open(str(tmp_path / "cover.mkv"), "w") as file:
        streams = [file.add_stream("mjpeg", rate=25), file.add_stream("libx264", rate=25)]
        streams[0].pix_fmt = "yuvj420p"
        for stream in streams:
            stream.width = stream.height = 64
        for stream, count in zip(streams, (1, 12)):
            for _ in range(count):
                file.mux(stream.encode(black))
            file.mux(stream.encode())
    assert count_frames(tmp_path / "cover.mkv") == 12


def test_a_file_deleted_while_training(tmp_path, capsys):
    """Catches a file that vanished after the scan and ends the run, or whose label stays behind with another clip."""
    for name in ("a", "b"):
        write_clip(tmp_path / "d" / name / "x.mp4")
    videos = data.build_dataset(folder_config(tmp_path / "d", tmp_path))
    videos.files[0].unlink()
    assert {videos[0, seed][1] for seed in range(4)} == {1}
    assert "skipping" in capsys.readouterr().err
    videos.files[1].unlink()
    assert "FileNotFoundError" in one_line(videos.__getitem__, (0, 0))              # the last reason is named


def test_clips_are_shaped_scaled_and_mirrored(tree, tmp_path):
    """Catches [0, 1] pixels, a crop off the centre, a flip in time, and clips that ignore their seed."""
    ramp = np.zeros((40, 80, 3), np.uint8)
    ramp[:, 40:] = 255                                  # right half white: a centred square crop is half white
    clip = data.from_uint8(data.shrink(ramp, 20))
    assert clip.shape == (3, 20, 20) and clip.min() == -1 and clip.max() == 1 and abs(clip.mean()) < 0.06
    videos = data.build_dataset(folder_config(tree, tmp_path))
    levels = {round(float(videos[0, seed][0][0].mean()), 2) for seed in range(12)}
    assert len(levels) > 3
    assert (videos[0, 3][0].mean((1, 2, 3)).diff() > 0).all()                       # time runs forward


@pytest.mark.parametrize("stride", [0, 1, 2])
def test_clips_in_memory_are_the_loaders(tree, tmp_path, monkeypatch, stride):
    """Catches kept clips of other frames, unmirrored or with other labels; and memory taken that is not there."""
    videos = data.build_dataset(folder_config(tree, tmp_path, stride=stride))
    keys = [(i, seed) for i in range(len(videos)) for seed in range(5)]
    decoded = [videos[key] for key in keys]
    videos.keep(torch.device("cpu"))
    monkeypatch.setattr(data, "read_frames", None)      # the decoder is gone
    for key, (clip, label) in zip(keys, decoded):
        kept, same = videos[key]
        assert kept.dtype == torch.float32 and torch.equal(kept, clip) and same == label
    monkeypatch.setattr(data, "free_memory", lambda device: 1000)
    assert "--no-in-memory" in one_line(videos.keep, torch.device("cpu"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_long_film_is_shrunk_frame_by_frame(tmp_path, monkeypatch):
    """Catches a film held whole at its full size before it is shrunk, as arrays or as decoded frames: 276 MB here."""
    resident = []

    def watched(image, resolution, shrink=data.shrink):
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
        return shrink(image, resolution)

    write_clip(tmp_path / "x.mp4", 100, size=(720, 1280), codec="mpeg4", gop=100)
    monkeypatch.setattr(data, "shrink", watched)
    data.read_frames(tmp_path / "x.mp4", range(3), 16)
    assert data.read_frames(tmp_path / "x.mp4", range(100), 16).shape == (100, 16, 16, 3)
    assert len(resident) == 103 and max(resident) - resident[2] < 60e6


def test_threads_stop_when_the_caller_does():
    """Catches Ctrl-C that waits for a long film: whoever leaves the loop waits for no work that goes on."""
    wait = threading.Event()
    results = data.in_threads(lambda item: item if item == 0 else wait.wait(60), range(3), "")
    assert next(results) == 0
    since = os.times().elapsed
    results.close()                                     # what an exception in the loop does
    assert os.times().elapsed - since < 20
    wait.set()


def test_missing_data_names_the_tree(tmp_path):
    """Catches a traceback where a newcomer needs the expected folder layout."""
    for root in ("", str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(SystemExit, match="(?s)expected.*UCF101.rar"):
            data.build_dataset(folder_config(root, tmp_path))


def test_toy_clips_never_coincide():
    """Catches held-out clips drawn from the training stream, clips that do not follow from the seed, and new drawings."""
    cfg = folder_config("", Path("out"), frames=8)
    train = data.ToyVideos(cfg)
    held = data.ToyVideos(cfg, held_out=True)
    assert torch.equal(train[5, 0][0], train[5, 1][0]) and train[5, 0][1] == 5
    first = torch.stack([train[i, 0][0] for i in range(64)])
    other = torch.stack([held[i, 0][0] for i in range(64)])
    assert (first[:, None] - other[None]).abs().amax((2, 3, 4, 5)).min() > 0.05
    assert first.min() >= -1 and first.max() <= 1 and len(train.classes) == 8
    means = [float(first.mean()), float(first.std()), float(other.mean()), float(other.std())]
    assert means == pytest.approx([-0.473799, 0.302371, -0.4689, 0.292422], abs=1e-5)  # old figures hold for these clips only


def test_saved_videos_read_back(tmp_path):
    """Catches channel swaps, lost frames and truncation instead of rounding on the way to a file."""
    video = torch.zeros(5, 3, 30, 34) - 1
    video[:, 0, :, 16:] = 1                             # right half red
    video[torch.arange(5), 1, torch.arange(5)] = 1      # frames differ, else a gif merges them
    for name in ("x.mp4", "x.gif"):
        data.save_video(tmp_path / name, video)
        back = np.stack(list(iio.imiter(tmp_path / name, plugin="pyav")))
        assert len(back) == 5 and back[2, 60, 20].max() < 60
        assert back[2, 60, 80, 0] > 200 and back[2, 60, 80, 2] < 60
    data.save_video(tmp_path / "x.png", video)
    assert np.array_equal(iio.imread(tmp_path / "x.png"), data.to_uint8(data.enlarge(video))[0])
    data.save_video(tmp_path / "own.mp4", torch.zeros(2, 3, 128, 128))
    assert iio.imread(tmp_path / "own.mp4", plugin="pyav").shape == (2, 128, 128, 3)      # at its own size
    assert data.to_uint8(torch.full((3, 1, 1), 0.997))[0, 0, 0] == 255              # 254.6: rounded, not cut
    every = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 3)
    assert np.array_equal(data.to_uint8(data.from_uint8(every)), every)             # bytes survive both ways


@pytest.mark.parametrize("fps", [8, 24, 64, 100, 240])
def test_gifs_last_as_long_as_their_clips(tmp_path, fps):
    """Catches delays below 20 ms, which browsers play as 100, and a rounded delay that adds up: 6.4 s for 1 s."""
    video = torch.eye(64).view(64, 1, 8, 8).expand(64, 3, 8, 8)
    data.save_video(tmp_path / "x.gif", video, fps)
    gif = data.Image.open(tmp_path / "x.gif")
    delays = []
    for k in range(gif.n_frames):
        gif.seek(k)
        delays.append(gif.info["duration"])
    assert min(delays) >= 20 and abs(sum(delays) - 64000 / fps) <= 20
    assert len(delays) == -(-64 // max(1, -(-fps // 50)))


def test_files_that_are_not_ours_stay(tmp_path, full_disk):
    """Catches a picture written over somebody's own film, a half-written file, and a list that forgets its names."""
    mine = tmp_path / "holiday.mp4"
    mine.write_bytes(b"mine")
    assert "not one of ours" in one_line(data.save_video, mine, torch.zeros(2, 3, 8, 8))
    assert mine.read_bytes() == b"mine"
    for _ in range(2):                                  # ours may be replaced
        data.save_video(tmp_path / "x.gif", torch.rand(2, 3, 8, 8))
    assert data.written(tmp_path) == ["x.gif", ""]
    (tmp_path / "index.html").write_text("<h1>mine</h1>")
    assert "not one of ours" in one_line(data.write_page, tmp_path, "run", {})
    assert (tmp_path / "index.html").read_text() == "<h1>mine</h1>"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".written", "holiday.mp4", "index.html", "x.gif"]
    full_disk(2000)
    assert "cannot write" in one_line(data.save_video, tmp_path / "x.gif", torch.rand(9, 3, 128, 128))
    full_disk()
    assert iio.imread(tmp_path / "x.gif").shape[0] == 2 and not list(tmp_path.glob("*.part"))


def test_tile_is_smooth_and_labelled():
    """Catches cells in the wrong place, blocky enlargement, and labels cut off, unreadable or over the neighbour."""
    videos = torch.linspace(-1, 1, 3)[:, None, None, None, None].expand(3, 2, 3, 32, 32)
    plain = data.tile(videos, 2)
    assert plain.shape == (2, 3, 2 * 132, 2 * 132)
    assert [float(plain[0, 0, y, x]) for y, x in ((60, 60), (60, 200), (200, 60), (200, 200))] == [-1, 0, 1, 1]
    sheet = data.tile(videos, 2, ["left", "a label that is much too long for its little cell", "x"])
    assert sheet.shape[2] - plain.shape[2] == 2 * 24
    assert sheet[0, 0, 2:26, 2:40].min() < 0 and sheet[0, 0, 2:26, 134:174].min() < 0
    assert (sheet[0, 0, :26, 130:134] == 1).all()       # nothing is written between two cells
    edge = torch.ones(1, 1, 3, 32, 32)
    edge[..., 16:] = -1
    assert len(data.tile(edge, 1).unique()) > 5         # grey levels between black and white


def test_page_of_a_run(tmp_path):
    """Catches numbers that are not the log's, names of files that are gone, and a class name that is taken for code."""
    rows = [dict(step=k, loss=1 / k, note="x") for k in range(1, 1200)]
    lines = [json.dumps(row) for row in rows] + ['{"step": 1200, "loss": NaN}', '{"step": 12']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    for name in ("a.gif", "b.png", "c d'é.mp4", "gone.gif"):
        data.save_video(tmp_path / name, torch.rand(2, 3, 8, 8))
    (tmp_path / "gone.gif").unlink()
    (tmp_path / "yours.gif").write_bytes(b"")
    data.write_page(tmp_path, "</script><b>", dict(classes=["</script>", "a & b"], lr=1e-3))
    text = (tmp_path / "index.html").read_text()
    assert len(text.splitlines()) <= 120 and text.count("</script>") == 1
    told = json.loads(re.search(r"const run = (.*)", text)[1])
    assert told["title"] == "</script><b>" and told["settings"] == dict(classes=["</script>", "a & b"], lr=1e-3)
    assert told["files"] == ["c d'é.mp4", "b.png", "a.gif"]
    assert told["rows"][:-1] == rows and math.isnan(told["rows"][-1]["loss"])
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)               # nothing from elsewhere


def make_videos(path, count=5, **settings):
    """`count` random clips with tokens, in a finished file. Returns clips, tokens."""
    clips = torch.rand(count, 4, 3, 8, 8) * 2 - 1
    tokens = torch.randn(count, 3, 2)
    store = data.Videos.create(path, settings, ["a", "b"])
    store.add(clips, [i % 2 for i in range(count)], tokens)
    store.close()
    return clips, tokens


def test_videos_on_disk_grow_and_go_on(tmp_path):
    """Catches clips lost or doubled by a stop, labels or tokens of other clips, and settings that are not looked at."""
    path = tmp_path / "run/samples.npy"
    clips = torch.rand(5, 4, 3, 8, 8) * 2 - 1
    tokens = torch.randn(5, 3, 2)
    settings = dict(kind="samples", guidance=1.5, size=(8, 8))
    for first, last in ((0, 2), (2, 4), (4, 5)):
        store = data.Videos.create(path, settings, ["a", "b"])
        assert len(store) == first                      # a fresh process goes on
        store.add(clips[first:last], [0, 1, 1, 0, 1][first:last], tokens[first:last])
        with open(path, "ab") as file:
            file.write(b"half a clip")                  # what a kill leaves
        assert "unfinished" in one_line(data.Videos.open, path)
    data.append(path, data.to_uint8(clips[4:]), 4)
    store.close()
    back = data.Videos.open(path)
    assert back.pixels.shape == (5, 4, 8, 8, 3) and back.classes == ["a", "b"] and len(back) == 5
    assert back.labels.tolist() == [0, 1, 1, 0, 1] and back.settings["guidance"] == 1.5
    assert np.array_equal(back.tokens, tokens.numpy())
    whole = torch.stack([back[i, 0][0] for i in range(5)])
    torch.testing.assert_close(whole, clips, rtol=0, atol=0.5001 / 127.5)
    assert back[4, 7][1] == 1 and len(data.Videos.create(path, settings, ["a", "b"])) == 5
    assert len(data.Videos.create(path, settings, ["b", "a"])) == 0                 # other classes: anew
    make_videos(path)
    assert len(data.Videos.create(path, {**settings, "guidance": 2}, ["a", "b"])) == 0


def test_altered_videos_are_refused(tmp_path):
    """Catches pixels, labels or tokens read past a wrong checksum, and a traceback for a file that is not ours."""
    path = tmp_path / "samples.npy"
    make_videos(path)
    rng = np.random.default_rng(0)
    for part in (path, path.with_suffix(".json"), path.with_suffix(".tokens.npy")):
        whole = part.read_bytes()
        for k in range(30):
            place = rng.integers(len(whole) - 2)
            changed = bytes([whole[place] ^ 1 << k % 8])
            part.write_bytes([whole[:place] + changed + whole[place + 1:], whole[:place]][k % 2])
            assert "samples" in one_line(data.Videos.open, path)
        part.unlink()
        assert "samples" in one_line(data.Videos.open, path)
        part.write_bytes(whole)
    assert len(data.Videos.open(path)) == 5
    for name in ("mine.npy", "mine.json"):
        (tmp_path / name).write_bytes(b"mine")
        assert "not ours" in one_line(data.Videos.create, tmp_path / "mine.npy", {}, [])
        assert (tmp_path / name).read_bytes() == b"mine"
        (tmp_path / name).unlink()


def test_a_full_disk_costs_no_clip(tmp_path, full_disk):
    """Catches SIGBUS of a memory map on a full disk, and clips that were whole before it and are lost after."""
    path = tmp_path / "samples.npy"
    clips = torch.rand(9, 4, 3, 8, 8) * 2 - 1
    store = data.Videos.create(path, {}, ["a"])
    store.add(clips[:3], [0, 0, 0])
    full_disk(4000)
    assert "cannot write" in one_line(store.add, clips[3:], [0] * 6)
    full_disk()
    again = data.Videos.create(path, {}, ["a"])
    assert len(again) == 3
    again.add(clips[3:], [0] * 6)
    again.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    finished = data.Videos.create(path, {}, ["a"])
    assert "has changed" in one_line(finished.close)    # a finished file keeps its checksums
    path.write_bytes(whole)
    torch.testing.assert_close(data.Videos.open(path)[2, 0][0], clips[2], rtol=0, atol=0.5001 / 127.5)


def test_a_disk_that_was_full_from_the_start(tmp_path, full_disk):
    """Catches a set of clips that is called a stranger's after its very first write failed."""
    path = tmp_path / "samples.npy"
    store = data.Videos.create(path, {}, ["a"])
    full_disk(1000)
    assert "cannot write" in one_line(store.add, torch.zeros(9, 4, 3, 8, 8), [0] * 9)
    full_disk()
    assert len(data.Videos.create(path, {}, ["a"])) == 0


def test_a_gif_of_one_frame(tmp_path):
    """Catches a list of delays where there is one frame."""
    data.save_video(tmp_path / "one.gif", torch.zeros(1, 3, 8, 8))
    assert (tmp_path / "one.gif").stat().st_size > 0


def test_two_runs_into_one_folder(tmp_path):
    """Catches two runs that overwrite each other, and a folder that cannot be made told by a traceback."""
    with data.claim(tmp_path / "new/run"):
        assert "another run" in one_line(data.claim(tmp_path / "new/run").__enter__)
    with data.claim(tmp_path / "new/run"):              # free again
        pass
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below"):
        assert "cannot write" in one_line(data.claim(tmp_path / folder).__enter__)


def test_what_a_launcher_left_behind(monkeypatch):
    """Catches leftover variables of a launcher that end in a traceback, or start a run that waits for nobody."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for words, expected in (("", (0, 1)), ("0 1", (0, 1)), ("1 2 here 29500", (1, 2)), ("1", None),
                            ("x 2 here 29500", None), ("2 2 here 29500", None), ("-1 1", None), ("0 0", None)):
        values = words.split() + [""] * 4
        for name, value in zip(names, values):
            monkeypatch.setenv(name, value)
        if expected:
            assert data.ranks() == expected
        else:
            assert "RANK" in one_line(data.ranks)
    for name, value in zip(names, "1 2 here 29500".split()):
        monkeypatch.setenv(name, value)
    assert "sample.py" in one_line(data.alone, "sample.py")


def test_bars_are_for_terminals(monkeypatch, capsys):
    """Catches bars in log files, and TQDM_DISABLE that is not heeded."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(data.progress(range(3))) == [0, 1, 2] and "3/3" in capsys.readouterr().err
    assert list(data.progress(range(3), quiet=True)) == [0, 1, 2]
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(data.progress(range(3))) == [0, 1, 2]
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert list(data.progress(range(3))) == [0, 1, 2] and not capsys.readouterr().err


def test_psnr_of_known_errors():
    """Catches the mean taken over a whole clip, and a peak of 1 for pixels that span 2."""
    a = torch.zeros(2, 3, 3, 4, 4)
    b = a.clone()
    b[:, 1] = 0.2                                       # an error of a tenth of the span: 20 dB
    b[:, 2] = 0.02
    assert data.psnr(a, b).tolist() == [[120, pytest.approx(20, abs=1e-5), pytest.approx(40, abs=1e-5)]] * 2


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
    assert abs(hidden - 1 / 7) < 0.02 and torch.equal(video, before)
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


@pytest.mark.skipif(not (FOOTAGE / "UCF-101").is_dir(), reason="no real footage beside the project")
def test_ucf_clips_are_whole(tmp_path, capsys):
    """Catches a loader that only works on made-up files: every one of 67 original avi is read from start to end."""
    videos = data.main(["--dataset", "ucf", "--data-root", str(FOOTAGE / "UCF-101"), "--out", str(tmp_path),
                        "--frames", "4", "--resolution", "32", "--stride", "0"])
    assert "67 videos of 26 classes" in capsys.readouterr().out
    for i in range(0, 67, 8):
        clip, label = videos[i, i]
        assert clip.std() > 0.05 and f"_{videos.classes[label]}_" in videos.files[i].name


# ---------------------------------------------------------------------------------------------- runs of both stages

FOLDER = {**TINY, "dataset": "folder", "resolution": 16, "patch_frames": 2, "kernel_init": 0.1, "workers": 0,
          "lpips_weight": 0.0, "gan_weight": 0.0, "gan_channels": 2, "gan_lr_ratio": 1.0,
          "gan_start": 0, "frames_per_step": 2}


def weights(path):
    """{part.name: tensor} of the networks in a checkpoint."""
    ckpt = torch.load(path, weights_only=True)
    found = {}
    for part in {"model", "ema", "critic"} & set(ckpt):
        for name, value in ckpt[part].items():
            found[f"{part}.{name}"] = value
    return found


def log_of(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def refusal(main, *words):
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A function that makes a folder of two classes of three videos, no two of them alike."""
    def make():
        root = tmp_path_factory.mktemp("films")
        for i in range(6):
            write_clip(root / "ab"[i % 2] / f"{i}.mp4", count=8 + i, size=(32, 32 + 16 * i))
        return root
    return make


@pytest.fixture(scope="module")
def folder_run(films, tmp_path_factory):
    """A tokenizer of such a folder; copy its checkpoint before you write beside it."""
    root = films()
    out = tmp_path_factory.mktemp("folder_run")
    path = nerv_vae.main(["--data-root", str(root), "--out", str(out), *flags(FOLDER)])
    return SimpleNamespace(root=root, vae=path)


def copied(source, target):
    """A file, or everything below a folder, at another place."""
    for path in [source, *source.rglob("*")]:
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("stage", ["vae", "gan and workers", "dit"])
def test_resume_is_exact(run, films, tmp_path, monkeypatch, no_pictures, stage):
    """Catches unsaved state, clips or noise that start over, loaders that die of a signal meant for all, and signals
    that stay caught: 3 steps, SIGTERM, 3 steps are 6 steps, bit by bit."""
    module = nerv_vae
    words = flags({**TINY, "steps": 6, "eval_every": 6, "flip": True})
    if stage == "gan and workers":
        gan = dict(gan_weight=1.0, gan_every=2, gan_start=1, batch=2, muon=True, workers=1, steps=6)
        words = ["--data-root", str(films()), *flags({**FOLDER, **gan})]
    if stage == "dit":
        module = nerv_dit
        words = ["--vae", str(run.vae), *flags({**TINY_DIT, "steps": 6, "scheduled_sampling": 1.0})]
    whole = module.main([*words, "--out", str(tmp_path / "whole")])
    update_ema = module.update_ema

    def stop_in_the_third_step(ema, model, decay, step):
        update_ema(ema, model, decay, step)
        if step == 2:
            for process in [os.getpid(), *(child.pid for child in torch.multiprocessing.active_children())]:
                os.kill(process, signal.SIGTERM)

    handlers = [signal.getsignal(number) for number in nerv_vae.STOPS]
    with monkeypatch.context() as patch:
        patch.setattr(module, "update_ema", stop_in_the_third_step)
        with pytest.raises(SystemExit) as stop:
            module.main([*words, "--out", str(tmp_path / "halves")])
    assert stop.value.code == 143
    assert handlers == [signal.getsignal(number) for number in nerv_vae.STOPS]
    stopped = torch.load(tmp_path / "halves/ckpt.pt", weights_only=True)
    assert stopped["step"] == 3
    assert stage == "dit" or stopped["ema"]["encoder.norm.num_batches_tracked"] > 0     # usable as it is
    expected = weights(whole)
    for name, value in weights(module.main([*words, "--out", str(tmp_path / "halves")])).items():
        assert torch.equal(value, expected[name]), f"{name} differs after resuming"


def test_two_processes_are_one(folder_run, tmp_path, no_pictures):
    """Catches ranks that train on the same clips or noise, BatchNorm over half a pass, gradients that add up, cached
    tokens of ranks that change places."""
    gan = dict(gan_weight=1.0, gan_every=1, frames_per_step=0, steps=4, lr=5e-5, eval_every=4, grad_accum=2, batch=8)
    more = dict(steps=4, eval_every=4, workers=0, clips_per_video=2, grad_accum=2)
    words = {}
    for home in (tmp_path / "one", tmp_path / "two"):
        vae = copied(folder_run.vae, home / "tokenizer/ckpt.pt")
        first = ["--data-root", str(folder_run.root), "--out", f"{home}/vae", *flags({**FOLDER, **gan})]
        second = ["--vae", str(vae), "--out", f"{home}/dit", *flags({**TINY_DIT, **more})]
        words[home.name] = [first, second]
    both = ("import os, sys, json, nerv_vae, nerv_dit\n"
            "for module, port, words in zip((nerv_vae, nerv_dit), *json.loads(sys.argv[1])):\n"
            "    os.environ['MASTER_PORT'] = str(port)\n"
            "    module.main(words)")
    stores = [nerv_vae.dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in range(2)]
    argument = json.dumps([[store.port for store in stores], words["two"]])
    del stores
    ranks = []
    for rank in range(2):
        launched = dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", OMP_NUM_THREADS="1",
                        CUDA_VISIBLE_DEVICES="")
        ranks.append(subprocess.Popen([sys.executable, "-c", both, argument], cwd=HERE, text=True,
                                      env={**os.environ, **launched}, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT))
    for module, what in zip((nerv_vae, nerv_dit), words["one"]):
        module.main(what)
    told = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
    # Attention does not depend on a shift of all keys, nor BatchNorm on one of its input: their biases get rounding
    # errors for gradients, which Adam makes as large as any.
    free = ("qkv.bias", "blocks.0.mlp.2.bias", "norm.running_mean")
    for stage in ("vae", "dit"):
        one, two = (tmp_path / home / stage for home in words)
        expected = weights(one / "ckpt.pt")
        for name, value in weights(two / "ckpt.pt").items():
            if not name.endswith(free):
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=f"{stage} {name}")
        for a, b in zip(log_of(one), log_of(two), strict=True):
            for key in a.keys() - {"clips_per_s", "token_std"}:                         # stds do not average
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key
    caches = [np.load(next(tmp_path.glob(f"{home}/tokenizer/tokens-*.npy"))) for home in words]
    np.testing.assert_allclose(*caches, rtol=0, atol=2e-3)


def test_batchnorm_of_ranks_survives_large_means(monkeypatch):
    """Catches a variance over ranks taken as a difference of large numbers, which is wrong by a third, or below 0."""
    x = (300 + 0.3 * torch.randn(512, 8)).requires_grad_()
    alone = nerv_vae.BatchNorm(8).double()
    ranks = nerv_vae.BatchNorm(8)
    expected = alone(x.double())                        # two ranks with the same tokens have the same statistics
    monkeypatch.setattr(nerv_vae.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(nerv_vae.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(nerv_vae, "of_all_ranks", lambda x: torch.cat([x, x]))
    torch.testing.assert_close(ranks(x), expected.float(), rtol=0, atol=5e-3)
    torch.testing.assert_close(ranks.running_var, alone.running_var.float(), rtol=1e-3, atol=0)


def test_memory_and_order_change_no_weights(folder_run, tmp_path, monkeypatch, no_pictures):
    """Catches kept clips of other frames, activations that are recomputed with other noise, and steps outside training
    that hold more clips than a training pass."""
    encode = nerv_vae.NeRVVAE.encode
    held = set()

    def watched(self, video):
        held.add(len(video))
        return encode(self, video)

    monkeypatch.setattr(nerv_vae.NeRVVAE, "encode", watched)
    settings = flags({**FOLDER, "flip": True, "grad_accum": 2, "steps": 3, "eval_every": 3})
    base = ["--data-root", str(folder_run.root), *settings]
    expected = weights(nerv_vae.main([*base, "--out", str(tmp_path / "plain")]))
    for change in ("in-memory", "checkpointing"):
        found = weights(nerv_vae.main([*base, "--out", str(tmp_path / change), f"--{change}"]))
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=f"{change} {name}")
    assert max(held) == 2


def test_a_cache_of_large_clips_holds_one_at_a_time(tmp_path, monkeypatch):
    """Catches 32 clips of 16 x 256 x 256 encoded at once, which no card holds that trains on one."""
    held = []

    def encode(video):
        held.append(len(video))
        return torch.zeros(2, len(video), 1, 1)

    vae = SimpleNamespace(cfg=SimpleNamespace(frames=16, resolution=256, tokens=1, token_dim=1), encode=encode)
    monkeypatch.setattr(data.ToyVideos, "__getitem__", lambda self, key: (torch.zeros(1), 0))
    with nerv_vae.Run(tiny_dit(out=str(tmp_path)), "") as run:
        nerv_dit.fill_cache(run.cfg, vae, run, data.ToyVideos(tiny()), tmp_path / "tokens-x.npy")
    assert held == [1] * 96


def test_bad_numbers_are_skipped_and_ten_in_a_row_stop(folder_run, tmp_path, monkeypatch, no_pictures):
    """Catches one bad batch that ruins the weights for good, and a run that goes on for days without learning."""
    settings = {**FOLDER, "steps": 6, "eval_every": 6, "muon": True}
    base = ["--data-root", str(folder_run.root)]
    keep = F.mse_loss
    calls = []

    def bad_third(a, b):
        calls.append(1)
        return keep(a, b) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(nerv_vae.F, "mse_loss", bad_third)
    path = nerv_vae.main([*base, "--out", str(tmp_path / "a"), *flags(settings)])
    assert [row["skipped"] for row in log_of(tmp_path / "a")] == [0, 0, 1, 0, 0, 0]
    adam, _ = torch.load(path, weights_only=True)["opts"]
    assert {float(state["step"]) for state in adam["state"].values()} == {5.0}
    assert all(value.isfinite().all() for value in weights(path).values())
    monkeypatch.setattr(nerv_vae.F, "mse_loss", lambda a, b: keep(a, b) * math.nan)
    settings = flags({**settings, "steps": 30, "eval_every": 30})
    told = refusal(nerv_vae.main, *base, "--out", tmp_path / "b", *settings)
    assert re.match(r"10 steps in a row .*'step': 10, 'loss': nan.*/[ab]/\d\.mp4", told)


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_a_full_disk_costs_no_checkpoint(run, tmp_path, capsys, monkeypatch, full_disk, no_pictures, stage):
    """Catches a save that destroys the file before it, a run that ends at the first failure, or one that hides it; and
    one that ends as its log lies on that disk too."""
    module = nerv_vae
    words = flags({**TINY, "steps": 3, "eval_every": 1, "out": str(tmp_path)})
    if stage == "dit":
        module = nerv_dit
        words = ["--vae", str(run.vae), *flags({**TINY_DIT, "steps": 3, "eval_every": 1, "out": str(tmp_path)})]
    first = module.main([*words, "--steps", "1"])

    def no_space(*_):
        raise OSError(28, "No space left on device")

    full_disk(100)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", SimpleNamespace(write=no_space, flush=no_space))
        told = refusal(module.main, *words)
    full_disk()
    assert "last save" in told and "make room" in told
    errors = capsys.readouterr().err.splitlines()
    assert all(line.startswith("could not write") for line in errors), errors
    for name, failed in (("ckpt.pt", 2), ("log.jsonl", 1), ("index.html", 1)):
        assert sum(name in line for line in errors) == failed
    assert not list(tmp_path.glob("*.part"))
    assert nerv_vae.load_checkpoint(first, "cpu", module.MADE_BY)["step"] == 1
    assert torch.load(module.main(words), weights_only=True)["step"] == 3


def test_a_full_disk_and_the_token_cache(folder_run, tmp_path, full_disk, no_pictures):
    """Catches SIGBUS, a traceback, leavings of gigabytes, and a cache that is half there and believed."""
    vae = copied(folder_run.vae, tmp_path / "vae/ckpt.pt")
    copied(folder_run.vae.parent / "index.json", tmp_path / "vae/index.json")
    settings = flags({**TINY_DIT, "clips_per_video": 8, "workers": 0, "steps": 1})
    words = ["--vae", vae, "--out", tmp_path / "dit", *settings]
    full_disk(5000)
    told = refusal(nerv_dit.main, *words)
    full_disk()
    assert "tokens-" in told and "make room" in told
    assert not list(tmp_path.glob("vae/tokens-*"))
    nerv_dit.main([str(word) for word in words])
    cache = next(tmp_path.glob("vae/tokens-*.npy"))
    whole = cache.read_bytes()
    for damaged in (b"", whole[:-1], b"x" * len(whole)):
        cache.write_bytes(damaged)
        nerv_dit.main([*map(str, words), "--no-resume"])
        assert cache.read_bytes() == whole
    cache.with_suffix(".json").write_text("{")
    nerv_dit.main([*map(str, words), "--no-resume"])
    assert len(json.loads(cache.with_suffix(".json").read_text())["labels"]) == 48


def test_altered_checkpoints_are_refused(run, tmp_path):
    """Catches a damaged file that loads as if whole, ends in a traceback, or claims sizes that are then allocated; and
    files of an earlier format, of the other stage, of somebody else."""
    blob = run.dit.read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "ckpt.pt"
    whole = torch.load(run.dit, weights_only=True)
    refused = 0
    for _ in range(150):
        path.write_bytes(mutate(rng, blob))
        try:
            ckpt = nerv_vae.load_checkpoint(path, "cpu", nerv_dit.MADE_BY)
            assert all(torch.equal(value, ckpt["model"][name]) for name, value in whole["model"].items())   # padding
        except SystemExit as stop:
            refused += 1
            assert str(path) in stop.code and "\n" not in stop.code
    assert refused > 100
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:                  # small on disk, huge once opened
        bomb.writestr("archive/data.pkl", bytes(1 << 24))
    with pytest.raises(SystemExit, match="damaged"):
        nerv_vae.load_checkpoint(path, "cpu", nerv_dit.MADE_BY)
    with pytest.raises(SystemExit, match="made by python nerv_dit.py"):
        nerv_vae.load_vae(run.dit, "cpu")
    for foreign in ({**whole, "format": 1}, {"state_dict": {}}, [1, 2]):
        torch.save(foreign, path)
        assert str(path) in refusal(nerv_dit.main, "--vae", run.vae, "--out", tmp_path, *flags(TINY_DIT))
    path.write_text("version https://git-lfs.github.com/spec/v1")
    assert "damaged" in refusal(nerv_dit.main, "--vae", path, "--out", tmp_path / "x")


def test_cached_tokens_are_the_encoders(folder_run, tmp_path, monkeypatch):
    """Catches a cache in another order than its labels, tokens of another clip, the label of a broken file given to
    the clip that is read in its place, and old tokens of a video that another has replaced under the same name."""
    vae = nerv_vae.load_vae(copied(folder_run.vae, tmp_path / "ckpt.pt"), "cpu")
    root = copied(folder_run.root, tmp_path / "videos")
    cfg = tiny_dit(vae=str(vae.path), dataset="folder", data_root=str(root), clips_per_video=2)
    read_frames = data.read_frames

    def one_is_broken(path, *how):
        if path.name == "0.mp4":
            raise data.Unreadable("broken since the scan")
        return read_frames(path, *how)

    with nerv_vae.Run(tiny_dit(out=str(tmp_path / "dit")), "") as run:
        clips = data.build_dataset(dataclasses.replace(vae.cfg, data_root=str(root), out=str(tmp_path)))
        monkeypatch.setattr(data, "read_frames", one_is_broken)
        cache, notes = nerv_dit.cache_tokens(cfg, vae, run)
        for row, i in enumerate(notes["videos"]):
            clip, label = clips[i, 1009 * i + row // len(clips)]
            cached = torch.from_numpy(cache[row, 0].copy()).float()
            torch.testing.assert_close(cached, vae.encode(clip[None])[0][0], rtol=0.01, atol=0.01)
            assert label == notes["labels"][row]
        assert len(cache) == 2 * len(clips) and notes["classes"] == ["a", "b"]
        changed = root / "a/2.mp4"
        state = changed.stat()
        blob = bytearray(changed.read_bytes())
        changed.write_bytes(blob)                       # of the same length
        os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000))
        nerv_dit.cache_tokens(cfg, vae, run)
    assert len(list(tmp_path.glob("tokens-*.npy"))) == 2


def test_a_run_goes_on_as_itself_or_not_at_all(run, tmp_path, no_pictures):
    """Catches another model under the same name, a class taken for another one, a moved run that cannot go on, and
    files that --no-resume loses before training starts."""
    told = refusal(nerv_vae.main, "--out", run.vae.parent, *flags({**TINY, "token_dim": 7, "steps": 3}))
    assert "token_dim 8 (now 7)" in told
    home = copied(run.out, tmp_path / "home")
    words = ["--out", str(home / "dit"), *flags(TINY_DIT)]
    path = nerv_dit.main(["--vae", f"{home}/./vae/../vae/ckpt.pt", *words, "--steps", "3"])
    ckpt = torch.load(path, weights_only=True)
    assert ckpt["step"] == 3
    ckpt["classes"][5] = "walking"
    nerv_vae.save_checkpoint(path, ckpt)
    told = refusal(nerv_dit.main, "--vae", home / "vae/ckpt.pt", *words)
    assert re.search(r"classes \[.*'walking'.*\(now .*'bar pulsing'", told)
    vae = torch.load(home / "vae/ckpt.pt", weights_only=True)
    nerv_vae.save_checkpoint(home / "vae/ckpt.pt", {**vae, "step": 7})
    assert "vae_sha256" in refusal(nerv_dit.main, "--vae", home / "vae/ckpt.pt", *words)
    before = path.read_bytes()
    told = refusal(nerv_dit.main, "--vae", home / "no.pt", *words, "--no-resume")
    assert "no checkpoint at" in told and path.read_bytes() == before and len(log_of(home / "dit")) == 3
    nerv_dit.main(["--vae", f"{home}/vae/ckpt.pt", *words, "--no-resume"])
    assert (home / "dit/ckpt.old.pt").read_bytes() == before and len(log_of(home / "dit")) == 2
    told = refusal(nerv_dit.main, "--vae", home / "vae/ckpt.pt", "--out", home / "vae", *flags(TINY_DIT), "--no-resume")
    assert "where the tokenizer lies" in told and nerv_vae.load_vae(home / "vae/ckpt.pt", "cpu").step == 7


def test_few_clips_and_few_classes(films, tmp_path, monkeypatch, no_pictures):
    """Catches a standard deviation of one clip, which is NaN: black samples, exit 0; --overfit that is judged on
    another clip than it trains on; and guidance away from nothing where there is one class."""
    root = films()
    read_frames = data.read_frames
    read = set()

    def watched(path, indices, *how):
        read.add((path, indices))
        return read_frames(path, indices, *how)

    monkeypatch.setattr(data, "read_frames", watched)
    words = ["--data-root", str(root / "a/4.mp4"), "--out", str(tmp_path / "one"), *flags(FOLDER)]
    one = nerv_vae.main([*words, "--overfit", "--split", "all"])
    assert len(read) == 1 and "psnr_train" in log_of(tmp_path / "one")[-1]
    words = flags({**TINY_DIT, "clips_per_video": 1, "workers": 0})
    assert "two clips at least" in refusal(nerv_dit.main, "--vae", one, "--out", tmp_path / "dit", *words)
    dit = nerv_dit.DiT(tiny_dit(), 6, 8, classes=1)
    torch.nn.init.normal_(dit.out.weight)
    z = torch.randn(2, 6, 8)
    t = torch.tensor([3, 700])
    assert torch.equal(dit(z, t, torch.zeros(2, dtype=int)), dit(z, t, torch.ones(2, dtype=int)))


def test_manners_of_a_process(run, tmp_path, monkeypatch, capfd, no_pictures):
    """Catches main() that fails in a thread, bars in log files, a launcher's variables that are told by a traceback,
    two runs into one folder, Ctrl-C before the first step that ends in a traceback, and files that nobody can make."""
    words = ["--vae", str(run.vae), *flags(TINY_DIT)]
    done = []
    thread = threading.Thread(target=lambda: done.append(nerv_dit.main([*words, "--out", str(tmp_path / "a")])))
    thread.start()
    thread.join()
    assert done == [tmp_path / "a/ckpt.pt"]
    told = capfd.readouterr()
    assert "\r" not in told.out + told.err and told.out.count("step 2 of 2") == 1
    with data.claim(tmp_path / "a"):
        assert "another run" in refusal(nerv_dit.main, *words, "--out", tmp_path / "a")
    (tmp_path / "file").write_text("")
    for main in (nerv_vae.main, lambda given: nerv_dit.main(["--vae", str(run.vae), *given])):
        assert str(tmp_path / "file") in refusal(main, "--out", tmp_path / "file/below")
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "1")
            assert "unset both" in refusal(main, "--out", tmp_path / "b")
        assert "--grad-accum" in refusal(main, "--out", tmp_path / "b", "--batch", 4, "--grad-accum", 3)

    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(nerv_dit, "build_dataset", interrupted)
    with pytest.raises(SystemExit) as stop:
        nerv_dit.main([*words, "--out", str(tmp_path / "c")])
    assert stop.value.code == 130


def test_restoration_is_asked_for_the_clean_clip(tmp_path, no_pictures):
    """Catches a PSNR against the degraded clip, or a log without the PSNR of what went in."""
    nerv_vae.main(["--out", str(tmp_path), *flags({**TINY, "degrade": "inpaint", "steps": 1, "eval_every": 1})])
    row, = log_of(tmp_path)
    held = data.ToyVideos(tiny(), held_out=True)
    order = np.random.default_rng(0).permutation(len(held))[:64]
    clips = torch.stack([held[int(i), 0][0] for i in order])
    vae = nerv_vae.load_vae(tmp_path / "ckpt.pt", "cpu")
    seen = data.degrade(clips, "inpaint")
    recon = vae.decode(vae.encode(seen)[0], torch.arange(4.0))
    for name, video in (("psnr_in", seen), ("psnr_held_out", recon)):
        expected = (10 * torch.log10(4 / (video - clips).square().mean((2, 3, 4)))).mean().item()
        assert row[name] == pytest.approx(expected, abs=0.01)
# ---------------------------------------------------------------------------------------------- wiring
# The parts have tests of their own. Here whole stages are written out a second time, from Eq. 1, A.1 and Eq. 2, with
# nothing of ours but the networks: what is drawn, from where, in which order, and what becomes of it. Operations keep
# their order: where a gradient is zero but for rounding (key biases; the last bias before BatchNorm), Adam makes steps
# of rounding errors that are as large as any.

class Clips(data.ToyVideos):
    """Toy clips that also depend on the seed they are drawn with, as clips of real videos do."""

    def __getitem__(self, key):
        clip, label = super().__getitem__(key)
        return clip + np.random.default_rng(key[1]).uniform(-0.2, 0.2), label


@pytest.fixture
def clips_by_seed(monkeypatch, no_pictures):
    for module in (nerv_vae, nerv_dit):
        monkeypatch.setattr(module, "build_dataset", Clips)


def by_hand_rate(step, cfg):
    """A.1: linear warmup, then a cosine to zero."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / (cfg.steps - cfg.warmup)))


def by_hand_average(ema, model, step, cfg):
    """Averaged weights that start as a short average, so that they forget the untrained ones."""
    with torch.no_grad():
        for average, new in zip(ema.parameters(), model.parameters()):
            average.lerp_(new, 1 - min(cfg.ema, (1 + step) / (10 + step)))


def by_hand_batch(clips, cfg, step):
    """The clips of a step: video and seed, in turn, from a generator of (seed, step)."""
    rng = np.random.default_rng([cfg.seed, step])
    drawn = []
    for _ in range(cfg.batch):
        video = int(rng.integers(len(clips)))
        drawn.append(clips[video, int(rng.integers(2 ** 62))][0])
    return torch.stack(drawn)                                           # (B, T, 3, H, W)


def by_hand_statistics(ema, clips, cfg):
    """BatchNorm of the averaged weights: means and variances of its inputs, averaged over passes of training."""
    inputs = []
    hook = ema.encoder.norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        for step in range(min(16, cfg.steps)):
            for clip in by_hand_batch(clips, cfg, step).chunk(cfg.grad_accum):
                ema.encode(data.degrade(clip, cfg.degrade))
    hook.remove()
    means = torch.stack([x.mean(0) for x in inputs])
    variances = torch.stack([x.var(0) for x in inputs])
    ema.encoder.norm.running_mean.copy_(means.mean(0))
    ema.encoder.norm.running_var.copy_(variances.mean(0))


def by_hand_optimizers(model, cfg):
    """A.1: AdamW; with --muon, Muon for what is a matrix."""
    matrices = []
    others = []
    for p in model.parameters():
        if cfg.muon and p.ndim == 2:
            matrices.append(p)
        else:
            others.append(p)
    opts = [torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0, fused=True)]
    if matrices:
        opts.append(torch.optim.Muon(matrices, weight_decay=0, adjust_lr_fn="match_rms_adamw"))
    return opts


def by_hand_step(opts, rate):
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = rate
        opt.step()


class Eye(torch.nn.Module):
    """Stands in for LPIPS: a distance of blurred colours."""

    def forward(self, a, b):
        assert a.shape == b.shape and a.shape[1:] == (3, 64, 64)        # small frames are enlarged for it
        return F.avg_pool2d(a - b, 3, stride=2).abs().mean((1, 2, 3), keepdim=True)


class LoudCritic(nerv_vae.Discriminator):
    """Has gradients with a norm above 1, so that clipping them would show: only the model's are clipped."""

    def forward(self, video):
        return 30 * super().forward(video)


def by_hand_stage_1(cfg, perceptual):
    """Stage 1 from Eq. 1 and A.1. Returns {network: state} and the losses of all passes."""
    clips = Clips(cfg)
    torch.manual_seed(cfg.seed)
    model = nerv_vae.NeRVVAE(cfg)
    ema = nerv_vae.NeRVVAE(cfg).eval()
    critic = LoudCritic(cfg)
    ema.load_state_dict(model.state_dict())
    opts = by_hand_optimizers(model, cfg)
    opt_d = torch.optim.AdamW(critic.parameters(), betas=(0.0, 0.99), weight_decay=0, fused=True)
    losses = []
    norms = []
    for step in range(cfg.steps):
        rate = by_hand_rate(step, cfg)
        video = by_hand_batch(clips, cfg, step)                         # (B, T, 3, H, W)
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        noise = torch.randn(cfg.batch, cfg.tokens, cfg.token_dim)
        order = torch.randperm(cfg.frames)
        adversarial = step >= cfg.gan_start
        k = cfg.frames if adversarial else cfg.frames_per_step          # a critic looks at whole clips
        frame = order[:k].sort().values
        each = cfg.batch // cfg.grad_accum
        pairs = []
        model.zero_grad()
        for first in range(0, cfg.batch, each):
            clip = video[first:first + each]
            seen = data.degrade(clip, cfg.degrade)                      # it is shown this, and asked for the clean one
            recon, mean, logvar = model(seen, frame.float(), noise[first:first + each])
            target = torch.stack([clip[:, t] for t in frame], 1)
            loss = F.mse_loss(recon, target)
            kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar)
            loss = loss + cfg.kl_weight * kl.sum((1, 2)).mean()
            error = recon - target
            across = error.diff(dim=-1).square().mean()
            down = error.diff(dim=-2).square().mean()
            loss = loss + cfg.edge_weight * (across + down)
            if step >= cfg.lpips_start:
                a = F.interpolate(recon.flatten(0, 1), (64, 64), mode="bilinear")
                b = F.interpolate(target.flatten(0, 1), (64, 64), mode="bilinear")
                loss = loss + cfg.lpips_weight * perceptual(a, b).mean()
            if adversarial:
                loss = loss + cfg.gan_weight * F.softplus(-critic(recon)).mean()
            (loss / cfg.grad_accum).backward()
            losses.append(loss.item())
            pairs.append((target, recon.detach()))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        by_hand_step(opts, rate)
        by_hand_average(ema, model, step, cfg)
        if adversarial and (step + 1) % cfg.gan_every == 0:
            critic.zero_grad()
            for real, fake in pairs:
                says = critic(torch.cat([real, fake]))
                loss = F.softplus(-says[:each]).mean() + F.softplus(says[each:]).mean()
                (loss / cfg.grad_accum).backward()
            critic_norm = torch.stack([p.grad.norm() for p in critic.parameters()]).norm()
            by_hand_step([opt_d], cfg.gan_lr_ratio * rate)
    assert max(norms) > 1 and critic_norm > 1
    by_hand_statistics(ema, clips, cfg)
    return dict(model=model.state_dict(), ema=ema.state_dict(), critic=critic.state_dict()), losses


def assert_same_weights(path, states):
    """A checkpoint holds these weights."""
    ckpt = torch.load(path, weights_only=True)
    for network, state in states.items():
        assert ckpt[network].keys() == state.keys()
        for name, expected in state.items():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(ckpt[network][name], expected, rtol=0, atol=1e-6, msg=f"{network} {name}")


def assert_logged(folder, losses, passes):
    """Every line of the log holds the mean loss of the passes since the line before."""
    start = 0
    for line in open(folder / "log.jsonl"):
        row = json.loads(line)
        end = row["step"] * passes
        assert row["loss"] == pytest.approx(np.mean(losses[start:end]), rel=1e-5)
        start = end
    assert start == len(losses)


@pytest.mark.parametrize("muon", [False, True])
def test_stage_1_written_out(clips_by_seed, tmp_path, monkeypatch, muon):
    """Catches wiring: other frames than the target's, noise of another pass, losses that are not divided, a critic
    with the wrong sign, rate or turn, a cosine that does not reach zero, statistics of other weights or other clips."""
    settings = {**TINY, "seed": 3, "steps": 6, "warmup": 2, "eval_every": 4, "log_every": 2, "ema": 0.3, "muon": muon,
                "grad_accum": 2, "frames_per_step": 3, "degrade": "inpaint", "kl_weight": 1e-3, "edge_weight": 0.3,
                "lpips_weight": 0.4, "lpips_start": 1, "gan_weight": 0.01, "gan_start": 1, "gan_every": 2,
                "gan_lr_ratio": 0.3, "gan_channels": 2}
    perceptual = Eye()
    monkeypatch.setattr(nerv_vae, "load_lpips", lambda name, device: perceptual)
    monkeypatch.setattr(nerv_vae, "Discriminator", LoudCritic)
    words = ["--out", str(tmp_path), *flags(settings)]
    if muon:                                            # and it goes on where a signal stopped it after two steps
        average = nerv_vae.update_ema

        def stop(ema, model, decay, step):
            average(ema, model, decay, step)
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(nerv_vae, "update_ema", stop)
            nerv_vae.main(words)
    path = nerv_vae.main(words)
    states, losses = by_hand_stage_1(nerv_vae.Config(**settings), perceptual)
    assert_same_weights(path, states)
    assert_logged(tmp_path, losses, passes=2)


def by_hand_schedule():
    """DDPM's: what is kept of the data's variance at each of 1000 times."""
    beta = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    return torch.cumprod(1 - beta, 0)                                   # (1000,)


def by_hand_tokenizer(path):
    """The averaged weights of a checkpoint of stage 1."""
    ckpt = torch.load(path, weights_only=True)
    vae = nerv_vae.NeRVVAE(nerv_vae.Config(**ckpt["config"])).eval()
    vae.load_state_dict(ckpt["ema"])
    return vae.requires_grad_(False)


def by_hand_cache(vae, cfg):
    """Mean and log-variance of clips of every training video, and the mean of what is shown of it; and the labels."""
    clips = Clips(vae.cfg)
    entries = []
    for r in range(cfg.clips_per_video):
        for i in range(len(clips)):
            clip = clips[i, cfg.seed * 1_000_003 + i * 1009 + r][0][None]
            entry = list(vae.encode(clip))
            if cfg.condition == "frames":
                shown = clip.clone()
                shown[:, 5:] = clip[:, 4:5]                             # the first 5 frames, then the 5th repeated
                entry.append(vae.encode(shown)[0])
            entries.append(torch.cat(entry))
    labels = torch.from_numpy(clips.labels).repeat(cfg.clips_per_video)
    return torch.stack(entries), labels                                 # (M, 2 or 3, N, d), (M,)


def by_hand_stage_2(cfg, cache, labels, classes):
    """Stage 2 from Sec. 3.3, Eq. 2 and A.1. Returns {network: state} and the losses of all passes."""
    M, _, N, d = cache.shape
    torch.manual_seed(cfg.seed)
    model = nerv_dit.DiT(cfg, N, d, classes)
    ema = nerv_dit.DiT(cfg, N, d, classes).eval()
    ema.load_state_dict(model.state_dict())
    some = cache[np.random.default_rng(0).permutation(M)]
    token_mean = some[:, 0].mean(0)
    token_std = (some[:, 0].var(0) + some[:, 1].exp().mean(0)).sqrt()   # of draws, not of means alone
    for network in (model, ema):
        network.token_mean.copy_(token_mean)
        network.token_std.copy_(token_std)
    opts = by_hand_optimizers(model, cfg)
    kept = by_hand_schedule()
    alpha = kept.sqrt().float()[:, None, None]                          # (1000, 1, 1)
    sigma = (1 - kept).sqrt().float()[:, None, None]
    losses = []
    own_steps = 0
    hidden_labels = 0
    for step in range(cfg.steps):
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        rows = torch.randint(M, (cfg.batch,)).sort().values
        chance = cfg.scheduled_sampling * min(1, step / (0.3 * cfg.steps))
        own = 1 if torch.rand(()) < chance else 0
        t = torch.randint(own, 1000, (cfg.batch,))
        hide = torch.rand(cfg.batch) < cfg.class_dropout
        first_noise, step_noise, draw_noise = torch.randn(3, cfg.batch, N, d)
        own_steps += own > 0
        model.zero_grad()
        each = cfg.batch // cfg.grad_accum
        for start in range(0, cfg.batch, each):
            part = slice(start, start + each)
            mean = cache[rows[part], 0]
            std = (cache[rows[part], 1] / 2).exp()
            tokens = (mean + std * draw_noise[part] - token_mean) / token_std
            if cfg.condition == "class":
                cond = labels[rows[part]].clone()
                cond[hide[part]] = classes
                hidden_labels += int(hide[part].sum())
            elif cfg.condition == "none":
                cond = torch.full((each,), classes)
            else:
                cond = cache[rows[part], 2]
            now = t[part]
            noise = first_noise[part]
            z = alpha[now] * tokens + sigma[now] * noise
            eps = model(z, now, cond)
            snr = (alpha[now] / sigma[now]).square()
            weight = torch.minimum(snr, torch.tensor(cfg.min_snr_gamma)) / snr
            loss = (weight * (eps - noise).square()).mean()
            if own:                                                     # scheduled sampling: from the own step too
                then = now - own
                with torch.no_grad():
                    guess = (z - sigma[now] * eps) / alpha[now]
                    share = (alpha[now] / alpha[then]) ** 2
                    z = (alpha[then] * (1 - share) * guess + alpha[now] / alpha[then] * sigma[then] ** 2 * z
                         ) / sigma[now] ** 2 + sigma[then] / sigma[now] * (1 - share).sqrt() * step_noise[part]
                    noise = (z - alpha[then] * tokens) / sigma[then]
                snr = (alpha[then] / sigma[then]).square()
                weight = torch.minimum(snr, torch.tensor(cfg.min_snr_gamma)) / snr
                loss = loss + (weight * (model(z, then, cond) - noise).square()).mean()
            (loss / cfg.grad_accum).backward()
            losses.append(loss.item() / (2 if own else 1))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        by_hand_step(opts, by_hand_rate(step, cfg))
        by_hand_average(ema, model, step, cfg)
    assert 0 < own_steps < cfg.steps - 1                                # both ways were taken
    assert cfg.condition != "class" or 0 < hidden_labels < cfg.steps * cfg.batch / 2
    return dict(model=model.state_dict(), ema=ema.state_dict()), losses


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Two tokenizers with wide posteriors; the second took the first one's place after a DiT was trained on that."""
    out = tmp_path_factory.mktemp("tokenizer")
    settings = {**TINY, "frames": 6, "logvar_start": -1.0, "steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        leave_out_pictures(patch)
        vae = nerv_vae.main(["--out", str(out), *flags(settings)])
        for condition in ("class", "frames"):
            dit = {**TINY_DIT, "seed": 3, "clips_per_video": 2, "condition": condition, "guidance": 1.0}
            nerv_dit.main(["--vae", str(vae), "--out", str(out / condition), *flags(dit)])
        return nerv_vae.main(["--out", str(out), "--no-resume", *flags({**settings, "seed": 1})])


@pytest.mark.parametrize("condition, seed", [("class", 3), ("frames", 3), ("none", 4)])
def test_stage_2_written_out(clips_by_seed, tokenizer, tmp_path, condition, seed):
    """Catches wiring: class dropout that is never applied, labels of other rows, a noise that is used twice, tokens
    of means alone or of another tokenizer, a wrong time or target in the second pass, losses that are not divided."""
    settings = {**TINY_DIT, "seed": seed, "steps": 6, "warmup": 2, "eval_every": 4, "log_every": 2, "ema": 0.3,
                "grad_accum": 2, "class_dropout": 0.3, "scheduled_sampling": 0.7, "clips_per_video": 2,
                "condition": condition, "guidance": 1.0, "muon": condition == "frames"}
    before = set(tokenizer.parent.glob("tokens-*.npy"))
    path = nerv_dit.main(["--vae", str(tokenizer), "--out", str(tmp_path), *flags(settings)])
    new, = set(tokenizer.parent.glob("tokens-*.npy")) - before          # the retrained tokenizer's own
    cache = torch.from_numpy(np.load(new)).float()
    cfg = nerv_dit.Config(**{**nerv_dit.PRESETS["toy"], **settings})
    expected, labels = by_hand_cache(by_hand_tokenizer(tokenizer), cfg)
    torch.testing.assert_close(cache, expected, rtol=1e-3, atol=1e-3)   # float16 on disk
    states, losses = by_hand_stage_2(cfg, cache, labels, len(Clips.classes))
    assert_same_weights(path, states)
    assert_logged(tmp_path, losses, passes=2)


def test_a_pass_of_one_clip(no_pictures, run, tmp_path):
    """Catches a batch axis that is lost where --grad-accum leaves one clip to a pass: numpy takes such rows for a number."""
    settings = dict(TINY_DIT, steps=2, batch=2, grad_accum=2)
    path = nerv_dit.main(["--vae", str(run.vae), "--out", str(tmp_path), *flags(settings)])
    assert torch.load(path, weights_only=True)["step"] == 2


def awake_checkpoint(run, path):
    """The DiT of a short run with weights that make a difference: eps is about z, and classes move it."""
    ckpt = torch.load(run.dit, weights_only=True)
    torch.manual_seed(0)
    for name, value in ckpt["ema"].items():
        if not name.startswith("token"):
            value.normal_(std=0.1)
    ckpt["ema"]["label.weight"].normal_()
    ckpt["ema"]["embed.weight"].normal_()
    ckpt["ema"]["out.weight"].copy_(2.8 * torch.linalg.pinv(ckpt["ema"]["embed.weight"]))
    ckpt["ema"]["token_mean"].normal_()
    ckpt["ema"]["token_std"].uniform_(0.5, 2)
    nerv_vae.save_checkpoint(path, ckpt)
    dit = nerv_dit.DiT(nerv_dit.Config(**ckpt["config"]), *ckpt["tokens"], len(ckpt["classes"]))
    dit.load_state_dict(ckpt["ema"])
    return dit.eval().requires_grad_(False)


def by_hand_video(dit, vae, i, label, seed, sampler, steps, guidance):
    """Video i from noise to pixels, alone. Shapes: -> tokens (N, d), video (T, 3, H, W)."""
    kept = by_hand_schedule()
    times = np.linspace(999, 0, steps).round().astype(int)
    shape = dit.token_mean.shape
    number = seed * 1_000_003 + i
    z = torch.randn(1, *shape, generator=torch.Generator().manual_seed(number))
    fresh = torch.randn(steps, *shape, generator=torch.Generator().manual_seed(2 ** 31 + number))
    for k, t in enumerate(times):
        now = kept[t]
        then = kept[times[k + 1]] if k + 1 < steps else torch.ones(())
        t = torch.tensor([t])
        eps = dit(z, t, torch.tensor([label]))
        none = dit(z, t, torch.tensor([len(data.ToyVideos.classes)]))   # the class that stands for no class
        eps = none + guidance * (eps - none)
        clean = (z - (1 - now).sqrt() * eps) / now.sqrt()
        if sampler == "ddim":                           # DDIM, Eq. 12 with eta 0
            z = then.sqrt() * clean + (1 - then).sqrt() * eps
        else:                                           # DDPM, Eqs. 6 and 7
            beta = 1 - now / then
            mean = then.sqrt() * beta / (1 - now) * clean + (1 - beta).sqrt() * (1 - then) / (1 - now) * z
            z = mean + ((1 - then) / (1 - now) * beta).sqrt() * fresh[k]
        z = z.float()
    tokens = z * dit.token_std + dit.token_mean
    frame = torch.arange(TINY["frames"]).float()
    return tokens[0], vae.decoder(tokens, frame)[0]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_from_noise_to_pixels_written_out(no_pictures, run, tmp_path, sampler):
    """Catches wiring: tokens that are not scaled back before decoding, weights that are not the averaged ones, noise
    that depends on the batch or repeats in the next, labels of other videos, frames out of order, pixels in [0, 1]."""
    dit = awake_checkpoint(run, tmp_path / "dit.pt")
    vae = by_hand_tokenizer(run.vae)
    expected = []
    for i in range(5):
        expected.append(by_hand_video(dit, vae, i, i % 8, 7, sampler, 12, 2.5))
    pixels = torch.stack([video for _, video in expected])              # (5, T, 3, H, W)
    pixels = ((pixels + 1) * 127.5).round().permute(0, 1, 3, 4, 2).int()
    assert (pixels[1:] - pixels[:-1]).abs().float().mean() > 10         # or nothing is told apart here
    how = dict(n=5, seed=7, sampler=sampler, sample_steps=12, guidance=2.5)
    for batch in (2, 5):
        out = tmp_path / str(batch)
        sample.main(["--dit", str(tmp_path / "dit.pt"), "--out", str(out), "--batch", str(batch), *flags(how)])
        made = data.Videos.open(out / "samples.npy")
        assert made.labels.tolist() == [0, 1, 2, 3, 4]
        tokens = torch.stack([tokens for tokens, _ in expected])
        torch.testing.assert_close(torch.tensor(made.tokens), tokens, rtol=1e-3, atol=1e-3)
        found = torch.from_numpy(np.load(out / "samples.npy")).int()    # (5, T, H, W, 3)
        assert (found - pixels).abs().max() <= 1




# ---------------------------------------------------------------------------------------------- fvd.py

def exact_sample(n, root, seed=0):
    """n rows with mean exactly 0 and covariance exactly root^T root. Shapes: root (d, d) -> (n, d)."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(root), generator=rng, dtype=torch.float64)
    return torch.linalg.qr(x - x.mean(0)).Q * (n - 1) ** 0.5 @ root


def toy_clips(n, stream=0, size=32, frames=8):
    """Clips as training draws them (stream 0) or as they are held out (1), on the levels of bytes."""
    cfg = SimpleNamespace(seed=0, frames=frames, resolution=size)
    videos = data.ToyVideos(cfg, held_out=bool(stream))
    return data.from_uint8(data.to_uint8(torch.stack([videos[i, 0][0] for i in range(n)])))


def keep(path, clips, tokens=None, classes=data.ToyVideos.classes, labels=None, **settings):
    """Clips on disk, as sample.py writes them."""
    _, frames, _, _, resolution = clips.shape
    settings = dict(frames=frames, resolution=resolution, stride=1) | settings
    videos = data.Videos.create(path, settings, list(classes))
    if labels is None:
        labels = np.arange(len(clips)) % len(classes)
    videos.add(clips, labels, tokens)
    videos.close()
    return str(path)


def keep_cache(path, mean, logvar, videos):
    """A token cache, as nerv_dit.py writes it."""
    np.save(path, np.stack([mean, logvar], 1).astype(np.float16))
    path.with_suffix(".json").write_text(json.dumps(dict(videos=np.asarray(videos).tolist())))
    return str(path)


def run_fvd(tmp_path, *argv):
    """What fvd.py writes: {name: value}, and the protocol."""
    path = fvd.main([*map(str, argv), "--out", f"{tmp_path}/out.json"])
    out = json.loads(path.read_text())
    return out["results"], out["protocol"]


class Probe(torch.nn.Module):
    """A feature network that returns how it was called and what it was fed."""

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        flags = torch.tensor([rescale, resize, return_features, x.dtype == torch.uint8])
        return torch.cat([flags.float().expand(x.shape[0], 4), x.flatten(1).float()], 1)


def close(value):
    return pytest.approx(float(value), rel=1e-10)


def test_frechet_distance_closed_forms():
    """Catches a lost square or factor 2, 1/n for 1/(n-1), the root of a singular covariance, float32 moments."""
    d = 40
    n = 300
    rng = torch.Generator().manual_seed(1)
    root, other, turn = torch.randn(3, d, d, generator=rng, dtype=torch.float64)
    a = exact_sample(n, root)
    b = exact_sample(n, other, 3) + 0.1
    assert fvd.frechet_distance(a, a + 2) == close(4 * d)                           # shift
    assert fvd.frechet_distance(a, 1.3 * a) == close(0.09 * root.square().sum())    # scale
    x, y = torch.rand(2, d, generator=rng, dtype=torch.float64)                     # diagonals commute
    x_rows = exact_sample(n, x.diag())
    y_rows = exact_sample(n + 7, y.diag(), 2)
    assert fvd.frechet_distance(x_rows, y_rows) == close((x - y).square().sum())
    u, w = root[:2]                                                                 # rank one
    line = exact_sample(n, torch.ones(1, 1).double())
    assert fvd.frechet_distance(line * u, line * w) == close(u @ u + w @ w - 2 * abs(u @ w))
    turn = torch.linalg.qr(turn).Q
    apart = close(fvd.frechet_distance(a, b))
    assert fvd.frechet_distance(b, a) == apart
    assert fvd.frechet_distance(a @ turn, b @ turn) == apart
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).sqrt().real.sum()           # by a matrix root
    assert 0.01 * d + root.norm() ** 2 + other.norm() ** 2 - 2 * cross == apart
    few = torch.randn(64, 400, generator=rng)                                       # n below d
    assert fvd.frechet_distance(few, few.flip(0)) < 1e-6
    far = few.double() + 100
    assert fvd.frechet_distance(far, far + 1) == pytest.approx(400, rel=1e-9)
    with pytest.raises(RuntimeError, match="finite"):
        fvd.frechet_distance(few, few * math.nan)


def test_inception_score_and_ssim():
    """Catches a KL the wrong way round, pixels taken for [0, 1], a window that does not sum to 1."""
    assert fvd.inception_score(torch.eye(101).repeat(3, 1)) == pytest.approx(101)
    a = torch.zeros(2, 3, 3, 16, 16)
    assert fvd.ssim(a - 1, a + 1).mean().item() == pytest.approx(9.999e-5, rel=1e-6)
    assert fvd.ssim(a, a).shape == (2, 3)
    assert fvd.ssim(a, a).min() > 1 - 1e-9
    known = (2 * .6 * .3 + 1e-4) / (.36 + .09 + 1e-4)
    assert fvd.ssim(a + 0.2, a - 0.4)[0, 0].item() == pytest.approx(known, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_lpips_of_a_clip_with_itself():
    """Catches clips and frames that change places (true SqueezeNet weights, where they are)."""
    if not (Path(torch.hub.get_dir()) / "checkpoints" / "squeezenet1_1-b8a52dc0.pth").exists():
        pytest.skip("no SqueezeNet weights in the torch hub cache")
    a = toy_clips(2, frames=3)
    b = a.clone()
    b[1, 2] = 0
    net = data.load_lpips("squeeze", "cpu")
    assert fvd.lpips_distance(a, a, net).abs().max() == 0
    assert (fvd.lpips_distance(a, b, net) > 0.01).nonzero().tolist() == [[1, 2]]


def test_action_similarity_of_known_windows():
    """Catches the cosine of a window with itself counted in, windows that do not overlap, a sum for a mean."""
    video = torch.zeros(2, 8, 3, 4, 4)
    video[0, :, 0] = 1                                  # the same all along
    video[1, :4, 0] = 1                                 # turns: windows 0..3, 2..5, 4..7
    video[1, 4:, 1] = 1
    found = fvd.action_similarity(video, lambda part: part.mean((1, 3, 4)), 4)
    assert found.shape == (2, 1)
    assert found[:, 0].tolist() == pytest.approx([1, (2 * 0.5 ** 0.5 + 0) / 3])


def test_networks_see_the_documented_input(tmp_path, monkeypatch):
    """Catches truncation to bytes, BTCHW for BCTHW, pixels in [0, 1], flags left off, a bottleneck ignored."""
    path = tmp_path / "probe.pt"
    torch.jit.script(Probe()).save(path)
    monkeypatch.setattr(fvd, "I3D_SHA256", data.file_hash(path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/i3d_torchscript.pt").write_bytes(path.read_bytes())
    video = torch.rand(2, 10, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    video[0, 0, :, 0, 0] = torch.tensor([0.0, 254.9, 127.6]) / 127.5 - 1
    seen = fvd.load_i3d()(video)
    assert seen[:, :4].tolist() == [[1, 1, 1, 1]] * 2
    assert seen[0, 4::160].tolist() == [0, 255, 128]
    fed = seen[:, 4:].view(2, 3, 10, 4, 4)
    assert torch.equal(fed, ((video + 1) * 127.5).round().transpose(1, 2))

    clips = toy_clips(4, frames=5, size=8)
    side = keep(tmp_path / "a.npy", clips)
    kept = []
    frechet = fvd.frechet_distance
    monkeypatch.setattr(fvd, "frechet_distance", lambda a, b: kept.append((a, b)) or frechet(a, b))
    argv = ["--real", side, "--fake", side, "--features", path, "--frames", 3]
    assert "FD-probe" in run_fvd(tmp_path, *argv)[0]
    fed = kept[0][0][:, 4:].view(4, 3, 3, 8, 8).transpose(1, 2)
    assert sorted(f.sum().item() for f in fed) == pytest.approx(sorted(clips[:, :3].sum((1, 2, 3, 4)).tolist()))
    assert min((fed - clip).abs().amax((1, 2, 3, 4)).min() for clip in clips[:, :3]) < 1e-6
    run_fvd(tmp_path, *argv, "--fvd-resolution", 4)
    assert kept[-1][0].shape[1] == 4 + 3 * 3 * 4 * 4


def test_i3d_is_checked_before_it_runs(tmp_path, monkeypatch):
    """Catches the opening of a file of unknown code, and an offline user who is not told the way to the true one."""
    def offline(url, file, hash_prefix):
        assert hash_prefix == fvd.I3D_SHA256, "downloaded without its hash"
        raise OSError("no network")

    file = tmp_path / "hub/checkpoints/i3d_torchscript.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"anything")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(SystemExit, match="not opened"):
        fvd.load_i3d()
    file.unlink()
    with pytest.raises(SystemExit) as stop:
        fvd.load_i3d()
    told = str(stop.value)
    for part in (*fvd.I3D_URLS, fvd.I3D_SHA256, "51,235,320", "hub/checkpoints/i3d_torchscript.pt"):
        assert part in told
    assert "\n" not in told


def test_fvd_of_a_pair(tmp_path, capsys):
    """Catches clips that lose their partner, a protocol not written down, results that depend on the batch."""
    clips = toy_clips(24)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(clips.shape, generator=rng) * 0.03 * torch.arange(24).view(-1, 1, 1, 1, 1) / 24
    noisy = data.from_uint8(data.to_uint8(clips + noise))
    keep(tmp_path / "original.npy", clips, pair="x")
    keep(tmp_path / "reconstruction.npy", noisy, pair="x", guidance=2.0)
    argv = ["--real", tmp_path, "--fake", tmp_path, "--features", "random", "--n", 20]
    rows, out = run_fvd(tmp_path, *argv, "--action-similarity", 4)
    picks = np.random.default_rng(0).permutation(24)[:20]
    a = clips[picks]
    b = noisy[picks]
    assert rows["PSNR pairs"] == pytest.approx(data.psnr(a, b).mean().item(), rel=1e-6)
    assert 0 < rows["SSIM pairs"] < 1
    direct = fvd.frechet_distance(fvd.random_features(a), fvd.random_features(b))
    assert rows["FD-random"] == pytest.approx(direct, rel=1e-3)
    assert rows["FD-random"] == run_fvd(tmp_path, *argv, "--batch", 3)[0]["FD-random"]
    assert rows["flickering fake"] < rows["flickering real"] < 1
    assert 0 < rows["action similarity real"] <= 1
    assert rows["FD-random floor"] > 0
    assert out["fake_guidance"] == 2
    assert sum(out["real_labels"].values()) == 20
    assert re.search("not FVD.*fewer than 800 bias.*fake_guidance", capsys.readouterr().out, re.S)


def test_sides_are_read_as_they_are(tmp_path):
    """Catches a mirrored real side, contact sheets taken for clips, labels compared by number, a lossy mp4 read."""
    for name, ball in (("ball", 0), ("cube", 1)):
        (tmp_path / "real" / name).mkdir(parents=True)
        for i in range(4):
            clip = data.draw_toy(np.random.default_rng(4 * ball + i), 0, 8, 32)
            data.save_video(tmp_path / "real" / name / f"{i}.gif", clip)
        (tmp_path / "real" / name / ".written").unlink()
    samples = tmp_path / "samples"
    keep(samples / "samples.npy", toy_clips(5), classes=["cube", "ring"])
    data.save_video(samples / "samples.gif", toy_clips(1)[0])
    data.save_video(samples / "000.mp4", toy_clips(1)[0])
    argv = ["--real", tmp_path / "real", "--fake", samples, "--features", "random"]
    _, out = run_fvd(tmp_path, *argv)
    assert out["fake_clips"] == "5 of 5"
    assert out["real_labels"] == dict(ball=4, cube=4)
    assert out["fake_labels"].keys() == {"cube", "ring"}
    cfg = fvd.Config(real=str(tmp_path / "real"), fake=str(samples), features="random", out=f"{tmp_path}/o.json")
    real, fake, _ = fvd.open_sides(cfg)
    for place in range(8):
        path = real.dataset.files[real.numbers[place]]
        assert torch.equal(real.read([place])[0], data.read_clip(path, 0, 8, 1, 32))
    assert torch.equal(fake.read(range(5)), toy_clips(5)[fake.numbers])


def test_long_clips_and_small_ones(tmp_path, capsys):
    """Catches long clips taken with the stride of training, short videos that vanish unnamed, k600 at full size."""
    (tmp_path / "real").mkdir()
    for i in range(5):
        clip = data.draw_toy(np.random.default_rng(i), i, 64 if i else 40, 128)
        data.save_video(tmp_path / "real" / f"clip{i}.mp4", clip)
    (tmp_path / "real" / ".written").unlink()
    side = keep(tmp_path / "samples.npy", toy_clips(4, frames=64, size=16), stride=1)
    argv = ["--real", tmp_path / "real", "--fake", side, "--features", "random", "--action-similarity", 16]
    rows, out = run_fvd(tmp_path, *argv)
    assert {"action similarity real", "action similarity fake"} < rows.keys()
    assert out["real_clips"] == "4 of 4"
    assert [out[key] for key in ("frames", "stride")] == [64, 1]
    assert "clip0.mp4" in capsys.readouterr().out
    side = keep(tmp_path / "k600.npy", toy_clips(4, frames=3))
    _, out = run_fvd(tmp_path, "--dataset", "k600", "--real", side, "--fake", side, "--features", "random")
    assert out["fvd_resolution"] == 64


def test_copies_are_found_and_fresh_draws_are_not(tmp_path):
    """Catches copies missed for being mirrored or cut from one video twice, new clips taken for copies."""
    copies = toy_clips(96)[:12].flip(-1)
    both = torch.cat([copies, toy_clips(12, stream=1)])
    rng = np.random.default_rng(0)
    mean = rng.normal(0, 1, (60, 4, 8)).repeat(3, 0)                    # three cached clips of a video
    mean += rng.normal(0, 0.03, mean.shape)
    logvar = np.full_like(mean, np.log(0.01))
    cache = keep_cache(tmp_path / "tokens-x.npy", mean, logvar, np.arange(60).repeat(3))
    tokens = np.concatenate([mean[::15] + rng.normal(0, 0.1, (12, 4, 8)), rng.normal(0, 1, (12, 4, 8))])
    keep(tmp_path / "samples.npy", both, torch.from_numpy(tokens))
    argv = ["--real", "toy", "--fake", tmp_path, "--features", "random", "--novelty", 2, "--tokens", cache]
    rows, _ = run_fvd(tmp_path, *argv)
    assert rows["std"] > 0
    for space in ("features", "pixels", "tokens"):
        assert rows[f"copies: {space}, generated"] == 0.5
    for space in ("features", "pixels"):
        assert rows[f"copies: {space}, real, held out"] == 0
        assert rows[f"d1 / d2: {space}, real, held out"] > 0.8
        assert 0 < rows[f"d1 / d2: {space}, training, with noise"] < 0.75
    assert rows["copies: pixels, training, with noise"] == 1
    assert rows["copies: tokens, training, drawn anew"] == 1
    assert rows["copies: tokens, training, nearest video left out"] == 0
    some = SimpleNamespace(dataset=data.Videos.open(tmp_path / "samples.npy"), numbers=np.arange(12))
    row = fvd.copied_tokens(some, fvd.Config(tokens=cache))[0]
    assert row[:2] == ("copies: tokens, generated", 1)  # of the clips that were drawn, the copies
    assert (tmp_path / "out.gif").exists()


def test_nearest_videos_by_hand():
    """Catches a second nearest of the same video, clips that change places, a width that is lost."""
    bank = torch.tensor([[0.0], [5.0], [0.1], [9.0]])
    video = ["a", "b", "a", "c"]
    nearest = fvd.nearest_videos(torch.tensor([[0.2], [8.0]]), bank, video)
    assert nearest.flatten().tolist() == pytest.approx([0.1, 4.8, 8.8, 1, 3, 7.9])
    nearest = fvd.nearest_videos(bank[:1], bank, video, width=0.5)
    assert nearest.tolist() == [[0, 10, 18]]
    with pytest.raises(ValueError, match="3 videos"):
        fvd.nearest_videos(bank, bank, torch.zeros(4))
    share, ratio = fvd.copy_rows("", torch.tensor([[1.0, 4, 5], [1, 2, 9], [3, 4, 9]]))
    assert (share[1], ratio[1]) == pytest.approx((1 / 3, 0.5))
    side = fvd.Side(["v_A_g01_c01.avi", "v_A_g01_c02.avi", "v_A_g02_c01.avi"], fvd.Config())
    side.dataset = SimpleNamespace(files=side.dataset)
    assert sorted(side.sources()) == ["v_A_g01", "v_A_g01", "v_A_g02"]  # clips of one group are one source


def test_token_diagnostics(tmp_path):
    """Catches plain kurtosis for excess, dead dims read from the width, rows mixed up."""
    rng = np.random.default_rng(0)
    mean = rng.normal(0, 1, (20, 8, 16)).repeat(15, 0)                  # 15 clips of a video
    mean += rng.normal(0, 0.05, mean.shape)
    logvar = np.full_like(mean, np.log(0.25))
    mean[:, 0] = -0.5                                                   # 2 of 8 tokens are dead
    mean[:, 1] = 0.5
    logvar[:, :2] = 0
    path = keep_cache(tmp_path / "tokens-x.npy", mean, logvar, np.arange(20).repeat(15))
    rows, _ = run_fvd(tmp_path, "--tokens", path)
    square = (mean ** 2 + np.exp(logvar)).mean()
    assert rows["dead dims"] == 0.25
    assert max(abs(rows["mean"]), abs(rows["skew"])) < 0.1
    assert rows["std"] == pytest.approx(square ** 0.5, rel=1e-2)
    assert abs(rows["kurtosis"]) < 0.3
    assert min(rows["purity"], rows["NMI"]) > 0.9
    found = fvd.purity_and_nmi(torch.arange(12) % 3, torch.arange(12) // 6)
    assert found == pytest.approx((0.5, 0), abs=1e-9)


def test_fvd_bad_input_is_one_line(tmp_path, monkeypatch):
    """Catches tracebacks where a newcomer needs a sentence, and values that nobody checks."""
    good = keep(tmp_path / "good" / "samples.npy", toy_clips(6))
    few = keep(tmp_path / "few.npy", toy_clips(2))
    short = keep(tmp_path / "short.npy", toy_clips(6, frames=4))
    broken = tmp_path / "broken.npy"
    broken.write_bytes(b"\x93NUMPY nonsense")
    lines = [few, short, broken, tmp_path / "nowhere", "", f"{good} --features no.pt", f"{good} --features i3d"]
    lines += [f"{good} --frames 9", f"{good} --resolution 64", f"{good} --action-similarity 8"]
    lines += [f"{good} --tokens no.npy", f"{good} --tokens {few}", f"{good} --frames 0"]
    lines += [f"{good} --features {good}", f"{good} --out {good}/x.json"]
    for line in lines:
        words = str(line).split() or [""]
        argv = ["--real", good, "--features", "random", "--out", f"{tmp_path}/o.json", "--fake", *words]
        with pytest.raises(SystemExit) as stop:
            pytest.fail(f"{line} passes: {fvd.main(argv)}")
        assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, line
    for line in ("--batch 0", "--n 3", "--seed -1", "--seed 4294967296", "--novelty -1", "--stride -2"):
        with pytest.raises(SystemExit) as stop:
            fvd.main(["--real", good, "--fake", good, *line.split()])
        assert stop.value.code == 2, line
    keep(tmp_path / "good" / "reconstruction.npy", toy_clips(6))
    with pytest.raises(SystemExit, match="name one"):
        fvd.main(["--real", good, "--fake", str(tmp_path / "good"), "--features", "random"])
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "0")
    with pytest.raises(SystemExit, match="one process"):
        fvd.main([])
# ---------------------------------------------------------------------------------------------- sample.py

def draw_clip(path, pixels=48, frames=16):
    """A video file whose frame k has grey level 8 k, with a bright left half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    video = np.full((frames, pixels, pixels, 3), 60, np.uint8)
    video[:, :, :pixels // 2] = 8 * np.arange(frames)[:, None, None, None] + 100
    iio.imwrite(path, video, plugin="pyav", codec="libx264", fps=25, in_pixel_format="rgb24")
    return path


def awaken(path, to):
    """A copy of a stage-2 checkpoint whose weights, means and stds are random: nothing is zero by chance."""
    torch.manual_seed(1)
    state = torch.load(path, weights_only=True)
    for name, value in state["ema"].items():
        state["ema"][name] = value + 0.3 * torch.randn_like(value)
    state["ema"]["token_std"] = torch.rand_like(state["ema"]["token_std"]) + 0.5
    nerv_vae.save_checkpoint(to, state)
    return to


@pytest.fixture(scope="module")
def lively(run):
    return awaken(run.dit, run.out / "lively.pt")


@pytest.fixture(scope="module")
def by_image(run):
    """A DiT that is shown the first frame of a clip."""
    settings = {**TINY_DIT, "steps": 1, "guidance": 1.0, "condition": "image"}
    path = nerv_dit.main(["--vae", str(run.vae), "--out", f"{run.out}/image", *flags(settings)])
    return awaken(path, run.out / "image.pt")


def run_sample(out, *words):
    """sample.py in a folder, with small pictures, as large gifs take long. Returns the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "enlarge", lambda video: video)
        return sample.main([*map(str, words), "--out", str(out)])


def pixels_of(folder, name="samples"):
    return np.load(folder / f"{name}.npy").astype(int)


def walk_by_hand(dit, label, noise, sampler, fresh, guidance=2.0, steps=3):
    """Noise to tokens with nothing of ours but the network: DDPM's posterior as Ho et al. print it, DDIM, eta 0."""
    kept = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000).double(), 0)
    times = [999, 500, 0]
    z = noise[None].double()
    for i, t in enumerate(times):
        then = kept[times[i + 1]] if i + 1 < steps else torch.ones(()).double()
        moment = torch.tensor([t])
        asked = dit(z.float(), moment, torch.tensor([label])).double()
        none = dit(z.float(), moment, torch.tensor([dit.classes])).double()
        eps = none + guidance * (asked - none)
        data_guess = (z - (1 - kept[t]).sqrt() * eps) / kept[t].sqrt()
        if sampler == "ddim":
            z = then.sqrt() * data_guess + (1 - then).sqrt() * eps
        else:
            alpha = kept[t] / then
            beta = 1 - alpha
            mean = then.sqrt() * beta * data_guess + alpha.sqrt() * (1 - then) * z
            spread = ((1 - then) / (1 - kept[t]) * beta).sqrt()
            z = mean / (1 - kept[t]) + spread * fresh[i].double()
    return (z.float() * dit.token_std + dit.token_mean)[0]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_from_noise_to_pixels_by_hand(run, lively, tmp_path, sampler):
    """Catches tokens not scaled back, guidance on half, noise of another video, other frames, other labels."""
    vae = nerv_vae.load_vae(run.vae, "cpu")
    dit = nerv_dit.load_dit(lively, "cpu")
    want = []
    for i, label in enumerate([5, 2, 5]):
        seed = 7 * 1_000_003 + i
        noise = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
        fresh = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(2 ** 31 + seed))
        tokens = walk_by_hand(dit, label, noise, sampler, fresh)
        want.append(vae.decoder.instantiate(tokens)(torch.arange(4.0)))
    want = (torch.stack(want).movedim(2, -1) + 1) * 127.5
    words = ["--dit", lively, "--n", 3, "--seed", 7, "--classes", "5, ring sliding", "--sampler", sampler, "--mp4", 0]
    for batch in (1, 3):
        out = run_sample(tmp_path / str(batch), *words, "--batch", batch, "--guidance", 2)
        assert abs(pixels_of(out) - want.numpy()).max() < 1.5
    clips = data.Videos.open(out / "samples.npy")
    assert [clips.classes[label] for label in clips.labels] == ["bar pulsing", "ring sliding", "bar pulsing"]
    assert clips.settings["sampler"] == sampler and clips.settings["steps"] == 3
    torch.testing.assert_close(torch.tensor(clips.tokens[2]), tokens, rtol=1e-3, atol=1e-3)


def test_pictures_are_of_the_samples(run, lively, tmp_path):
    """Catches sheets and films of other tokens, a slider's cell at the wrong place, frames between at wrong times."""
    words = ["--dit", lively, "--n", 3, "--interp", "--long", 2, "--mp4", 2]
    out = run_sample(tmp_path, *words)
    vae = nerv_vae.load_vae(run.vae, "cpu")
    clips = data.Videos.open(out / "samples.npy")
    assert clips.pixels.shape == (3, 8, 32, 32, 3) and clips.settings["stride"] == 0.5
    a, _, b = (vae.decoder.instantiate(torch.tensor(z)) for z in clips.tokens)
    assert np.array_equal(clips.pixels[0], data.to_uint8(a(torch.arange(8.0) / 2)))
    sheet = iio.imread(out / "interp_sheet.png").astype(int)
    assert sheet.shape == (4 * 32, 25 * 32, 3)          # the page knows of 25 columns and of square cells
    first = data.to_uint8(a(torch.tensor([2.0])))[0].astype(int)
    last = data.to_uint8(b(torch.tensor([3.0])))[0].astype(int)
    assert abs(sheet[64:96, :32] - first).max() <= 1
    assert abs(sheet[96:, -32:] - last).max() <= 1
    assert sorted(path.name for path in out.glob("*.mp4")) == ["000_ball-sliding.mp4", "001_ball-pulsing.mp4"]
    assert (out / "index.html").exists()


def test_time_between_and_beyond(run, lively, tmp_path, monkeypatch):
    """Catches frames that are divided by another number than was asked for."""
    asked = []
    wrote = []
    play = nerv_vae.NeRVVAE.play

    def listen(self, tokens, frame=None):
        asked.append(frame)
        return play(self, tokens, frame)

    monkeypatch.setattr(nerv_vae.NeRVVAE, "play", listen)

    def note(path, video, fps=8):
        wrote.append((path.name, len(video), fps))

    monkeypatch.setattr(sample, "save_video", note)
    run_sample(tmp_path, "--dit", lively, "--n", 1, "--time-interp", 5, "--extrapolate", "--mp4", 0)
    assert asked[0].tolist() == [0, 1, 2, 3]
    assert asked[2].tolist() == list(range(8))
    torch.testing.assert_close(asked[1], torch.arange(20) / 5)
    assert ("time_interp.gif", 20, 40) in wrote
    assert ("extrapolate.gif", 8, 8) in wrote


def test_film_ends_with_the_samples(run, lively, tmp_path, monkeypatch):
    """Catches a film of other videos than are generated, of steps that do not end, or too large to be shown."""
    seen = []
    draw = sample.film_sheet

    def listen(tokens, videos, names, done):
        seen.append((tokens, done, names))
        return draw(tokens, videos, names, done)

    monkeypatch.setattr(sample, "film_sheet", listen)
    out = run_sample(tmp_path, "--dit", lively, "--n", 2, "--film", "--sample-steps", 60)
    run_sample(tmp_path, "--dit", lively, "--n", 2, "--sample-steps", 60, "--mp4", 0)
    assert len(seen) == 50 + 25                         # the walk, then it holds
    assert 50 < count_frames(out / "film.gif") <= 75                       # equal pictures in a row are one
    dit = nerv_dit.load_dit(lively, "cpu")
    tokens = seen[-1][0] * dit.token_std + dit.token_mean
    kept = data.Videos.open(out / "samples.npy").tokens
    torch.testing.assert_close(tokens, torch.tensor(kept), rtol=1e-3, atol=1e-3)
    assert seen[0][2] == ["ball sliding", "ball pulsing"]
    assert seen[48][1] < seen[49][1] == seen[-1][1] == 1
    assert (out / "film.gif").stat().st_size < 3e6


def test_film_is_drawn_as_it_should():
    """Catches signs of the tokens that change colours, pictures in each other's place, a name that runs out of its card."""
    tokens = torch.zeros(4, 3, 5)
    tokens[3] = torch.tensor([9.0, -9.0, 0.0])[:, None]
    videos = torch.full((4, 3, 8, 8), -1.0)
    videos[1] = 1.0
    sheet = sample.film_sheet(tokens, videos, ["a", "b", "c", "a name as long as no card is wide"], 0.5)
    assert sheet.shape == (60 + 2 * 194, 12 + 3 * 316, 3)
    assert sheet[-20, 318:330].tolist() == 12 * [[13, 17, 23]]           # the second row has one card
    for y, colour in ((420, sample.CARD), (300, sample.WARM), (340, sample.COLD)):
        np.testing.assert_allclose(sheet[y, 40], list(bytes.fromhex(colour[1:])), atol=5)
    assert sheet[150, 12 + 316 + 12 + 128 + 24 + 60].tolist() == [255, 255, 255]
    assert (sheet[60:, 12 + 305:24 + 304] == (13, 17, 23)).all()


def test_labels_by_name():
    """Catches names with commas, other Unicode forms, digits that int() takes or refuses, and numbers out of range."""
    names = ["cafe\u0301", "a, b", "a", "b", "7"]
    names = [data.unicodedata.normalize("NFC", name) for name in names]
    for asked, labels in [
            ("", "012"),
            ("cafe\u0301", "000"),
            ("a, b", "111"),
            ("b,a", "323"),
            ("1 , caf\u00e9,", "101"),
            ("7", "444"),
            ("4,0", "404")]:
        assert "".join(map(str, sample.pick_labels(asked, names, 3))) == labels
    for asked in ("5", "-1", "\u00b2", "\u0663", "x,a", "aa", "9" * 5000):
        with pytest.raises(SystemExit, match="no class .* the classes are 0 caf"):
            sample.pick_labels(asked, names, 3)


def test_names_of_files():
    """Catches a class whose name leaves nothing, is a path, or is longer than a file's name may be."""
    assert sample.mp4_name(7, "Apply Eye/Makeup") == "007_Apply-Eye-Makeup.mp4"
    assert sample.mp4_name(7, "../..") == "007_video.mp4"
    assert sample.mp4_name(0, "\u8df3\u821e!") == "000_\u8df3\u821e.mp4"
    assert len(os.fsencode(sample.mp4_name(0, "\u8df3" * 200))) < 200


def test_only_our_own_files_are_replaced(run, tmp_path):
    """Catches an --out whose videos are deleted by a pattern, and one whose own are mixed with those of before."""
    mine = draw_clip(tmp_path / "001_holiday.mp4").read_bytes()
    (tmp_path / "001_ball-sliding.mp4").write_bytes(mine)
    words = ["--dit", run.dit, "--batch", 4]
    run_sample(tmp_path, *words, "--n", 3)
    run_sample(tmp_path, *words, "--n", 2)
    assert (tmp_path / "001_holiday.mp4").read_bytes() == mine
    found = sorted(path.name for path in tmp_path.glob("*.mp4"))
    assert found == ["000_ball-sliding.mp4", "001_ball-pulsing.mp4", "001_ball-sliding.mp4", "001_holiday.mp4"]
    with pytest.raises(SystemExit, match="not one of ours"):
        run_sample(tmp_path, *words, "--n", 2, "--classes", 0)
    assert (tmp_path / "001_ball-sliding.mp4").read_bytes() == mine


def test_sampling_goes_on_where_it_stopped(run, lively, tmp_path, monkeypatch):
    """Catches a half-written set that starts over, repeats videos, or is finished with another seed's."""
    words = ["--dit", lively, "--n", 4, "--batch", 2, "--mp4", 0]
    whole = run_sample(tmp_path / "a", *words)
    add = data.Videos.add

    def stop_after_one(self, *what):
        add(self, *what)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data.Videos, "add", stop_after_one)
        with pytest.raises(SystemExit, match="goes on"):
            run_sample(tmp_path / "b", *words)
    adds = []
    monkeypatch.setattr(data.Videos, "add", lambda *what: adds.append(what) or add(*what))
    again = run_sample(tmp_path / "b", *words)
    assert np.array_equal(pixels_of(again), pixels_of(whole))
    assert len(adds) == 1
    other = run_sample(tmp_path / "b", *words, "--seed", 1)
    assert not np.array_equal(pixels_of(other), pixels_of(whole))


@pytest.fixture(scope="module")
def of_folder(tmp_path_factory):
    """A tokenizer of the clips in a folder: groups 1 to 12 of classes ape and bee trained, three others did not."""
    root = tmp_path_factory.mktemp("folder")
    for name in ("ape", "bee"):
        for group in (3, 11, 20):
            draw_clip(root / f"clips/{name}/v_x_g{group:02d}_c01.mp4")
    (root / "clips/ape/broken.mp4").write_bytes(b"no video")
    settings = {**TINY, "dataset": "folder", "data_root": root / "clips", "split": "1-12", "workers": 0,
                "flip": True, "lpips_weight": 0.0, "gan_weight": 0.0}
    vae = nerv_vae.main(["--out", f"{root}/vae", *flags(settings)])
    return SimpleNamespace(root=root, vae=nerv_vae.load_vae(vae, "cpu"), path=vae)


def test_which_clips_did_not_train(of_folder, tmp_path):
    """Catches mirrored clips, a validation folder cut by the split or taken for the training folder, and the reverse."""
    found = {}
    root = of_folder.root
    other = tmp_path / "other"
    for i in range(4):
        draw_clip(other / f"cat/{i}.mp4")
    os.rename(root / "clips", root / "moved")
    try:
        for folder in (root / "moved", other):
            cfg = sample.Config(data_root=str(folder), out=str(tmp_path / "out"))
            clips, which = sample.unseen_clips(cfg, of_folder.vae)
            found[which] = [path.name for path in clips.files]
            for seed in range(6):
                clip = clips[0, seed][0]
                assert clip[..., :8].mean() > clip[..., -8:].mean()             # the bright half is on the left
    finally:
        os.rename(root / "moved", root / "clips")
    assert found == {"held-out": 2 * ["v_x_g20_c01.mp4"], "unseen": [f"{i}.mp4" for i in range(4)]}
    assert clips.classes == ["cat"]
    cfg = dataclasses.replace(of_folder.vae.cfg, split="all")
    every = SimpleNamespace(cfg=cfg, path=of_folder.vae.path)
    clips, which = sample.unseen_clips(sample.Config(), every)
    assert which == "training" and len(clips) == 6


def test_reconstruct_writes_a_pair(of_folder, tmp_path, monkeypatch, capsys):
    """Catches originals and reconstructions in different orders, also after a stop between the two; labels by number."""
    for i in range(3):
        draw_clip(tmp_path / f"other/{'cat' if i else 'ape'}/{i}.mp4")
    words = ["--vae", of_folder.path, "--reconstruct", "--n", 3, "--batch", 2, "--data-root", tmp_path / "other"]
    add = data.Videos.add
    calls = []

    def stop(self, *what):
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        add(self, *what)

    with monkeypatch.context() as patch:
        patch.setattr(data.Videos, "add", stop)
        with pytest.raises(SystemExit, match="goes on"):
            run_sample(tmp_path / "out", *words, "--batch", 1)
    out = run_sample(tmp_path / "out", *words)
    a = data.Videos.open(out / "original.npy")
    b = data.Videos.open(out / "reconstruction.npy")
    assert a.settings["pair"] == b.settings["pair"] and a.settings["which"] == "unseen"
    assert a.classes == b.classes == ["ape", "cat"]
    assert sorted(a.labels) == [0, 1, 1]
    assert np.array_equal(a.labels, b.labels)
    vae = of_folder.vae
    clips = torch.stack([a[i, 0][0] for i in range(3)])
    recon = vae.decode(vae.encode(clips)[0], torch.arange(4.0))
    assert abs(data.to_uint8(recon).astype(int) - b.pixels).max() <= 1
    told = float(re.search(r"PSNR (\S+) dB", capsys.readouterr().out)[1])
    error = ((a.pixels / 255 - b.pixels / 255) ** 2).mean((2, 3, 4))
    assert math.isclose(told, -10 * np.log10(error).mean(), abs_tol=0.006)


def test_every_clip_gets_its_own_answer(run, by_image, tmp_path, monkeypatch):
    """Catches a condition of the wrong clip: where the answer is what was shown, videos are what was shown, decoded."""
    seen = []
    show = data.condition_video
    monkeypatch.setattr(sample, "sample_tokens", lambda dit, cond, *_, **__: cond)
    monkeypatch.setattr(data, "condition_video", lambda clips, kind: seen.append(clips) or show(clips, kind))
    out = run_sample(tmp_path, "--dit", by_image, "--n", 5, "--batch", 2, "--mp4", 0)
    vae = nerv_vae.load_vae(run.vae, "cpu")
    held_out = data.build_dataset(vae.cfg, held_out=True)
    clips = data.Videos.open(out / "samples.npy")
    assert len(seen) == 5
    assert "held-out" in clips.settings["condition"]
    for i, clip in enumerate(seen):
        at = next(k for k in range(len(held_out)) if torch.equal(held_out[k, 0][0], clip))
        assert clips.labels[i] == held_out.labels[at]
        tokens = vae.encode(show(clip[None], "image"))[0][0]
        torch.testing.assert_close(torch.tensor(clips.tokens[i]), tokens, rtol=1e-4, atol=1e-4)


def test_predict(run, by_image, tmp_path, monkeypatch):
    """Catches answers to another clip than the file's, or to all of it."""
    told = []

    def listen(dit, cond, noise, *_, **__):
        told.append(cond)
        return noise

    monkeypatch.setattr(sample, "sample_tokens", listen)
    clip = draw_clip(tmp_path / "clip.mp4")
    out = run_sample(tmp_path / "s", "--dit", by_image, "--n", 3, "--batch", 2, "--predict", clip)
    first = data.read_clip(clip, 0, 1, 1, 32).expand(4, -1, -1, -1)
    want = nerv_vae.load_vae(run.vae, "cpu").encode(first[None])[0]
    torch.testing.assert_close(torch.cat(told), want.expand(3, -1, -1), rtol=1e-4, atol=1e-4)
    assert count_frames(out / "predict.gif") == 4 and (out / "predict.png").exists()


def test_exported_weights_sample_alike(run, lively, tmp_path):
    """Catches an export of raw weights, a lost token scale, or a pair of files that do not know each other."""
    words = ["--n", 2, "--mp4", 0]
    whole = pixels_of(run_sample(tmp_path / "a", "--dit", lively, *words))
    run_sample(tmp_path, "--dit", lively, "--export", tmp_path / "new/toy")
    half = pixels_of(run_sample(tmp_path / "b", "--weights", tmp_path / "new/toy", *words))
    assert abs(whole - half).mean() < 2
    handed = torch.load(tmp_path / "new/toy-vae.pt", weights_only=True)
    assert {value.dtype for value in handed["ema"].values()} <= {torch.float16, torch.int64}
    assert "opts" not in handed


# ---------------------------------------------------------------------------------------------- .nerv files

def mutate(rng, blob):
    """One to four bits flipped, a piece cut off, or a piece of the file copied over another place."""
    blob = bytearray(blob)
    kind = rng.integers(3)
    if kind == 0:
        for i in rng.integers(8 * len(blob), size=rng.integers(1, 5)):
            blob[i // 8] ^= 1 << i % 8
    elif kind == 1:
        del blob[rng.integers(len(blob)):]
    else:
        a, b, n = rng.integers(len(blob), size=3)
        blob[b:b + rng.integers(n + 1)] = blob[a:a + n]
    return bytes(blob)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_quantisation_formula(bits):
    """Catches 2^b for 2^b - 1, floor for round, and a range that misses its ends (NeRV-Enc A.4)."""
    tokens = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    levels, low, scale = sample.quantise(tokens, bits)
    exact = tokens.double().numpy()
    assert low == exact.min()
    assert levels.min() == 0
    assert levels.max() == 2 ** bits - 1
    assert math.isclose(scale, np.ptp(exact) / (2 ** bits - 1))
    error = np.abs(levels * scale + low - exact)
    assert 0.4 * scale < error.max() <= scale * (0.5 + 1e-9)
    header, stored = sample.unpack_tokens(sample.pack_tokens(tokens, bits, note="x"))
    assert np.array_equal(stored.numpy(), (levels * scale + low).astype(np.float32))
    assert header["note"] == "x"
    again = sample.unpack_tokens(sample.pack_tokens(stored, bits))[1]
    torch.testing.assert_close(again, stored, rtol=0, atol=1e-6)                # what is on the grid stays there
    assert torch.equal(sample.unpack_tokens(sample.pack_tokens(tokens, 32))[1], tokens)
    alike = torch.full((6,), -1.5)
    assert torch.equal(sample.unpack_tokens(sample.pack_tokens(alike, bits))[1], alike)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_coded_size_is_near_the_entropy(bits):
    """Catches bytes that are stored as they are, and a header that outgrows the tokens."""
    torch.manual_seed(0)
    tokens = torch.randn(128 * 128)
    share = np.bincount(sample.quantise(tokens, bits)[0]) / len(tokens)
    share = share[share > 0]
    entropy = -(share * np.log2(share)).sum() * len(tokens) / 8
    assert entropy < len(sample.pack_tokens(tokens, bits)) < 1.03 * entropy + 300


def test_compress_and_decompress(run, tmp_path, capsys):
    """Catches a file that holds other tokens than the encoder's, and one that is played by another tokenizer."""
    clip = draw_clip(tmp_path / "clip.mp4")
    vae = nerv_vae.load_vae(run.vae, "cpu")
    pixels = data.read_clip(clip, 0, 4, 1, 32)
    tokens = vae.encode(pixels[None])[0].flatten()
    words = ["--vae", run.vae]
    path = tmp_path / "clip.nerv"
    for bits in (4, 32):
        run_sample(tmp_path, *words, "--compress", clip, "--bits", bits)
        rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:7]]
        assert [row[0] for row in rows] == ["4", "5", "6", "7", "8", "32"]
        assert [str(bits), str(path.stat().st_size)] in [row[:2] for row in rows]
        header, stored = sample.read_nerv(path)
        assert torch.equal(stored, sample.unpack_tokens(sample.pack_tokens(tokens, bits))[1])
        assert header["vae_sha256"] == data.file_hash(run.vae)
    run_sample(tmp_path, *words, "--decompress", path)
    assert count_frames(f"{path}.mp4") == 4
    other = tmp_path / "other.pt"
    nerv_vae.save_checkpoint(other, {**torch.load(run.vae, weights_only=True), "step": 3})
    with pytest.raises(SystemExit, match="another tokenizer .* --vae"):
        run_sample(tmp_path, "--vae", other, "--decompress", path)


@pytest.mark.parametrize("bits", [5, 32])
def test_altered_nerv_files_are_refused(tmp_path, bits):
    """Catches a reader that crashes, believes a size or returns wrong tokens; half of the 400 have a true checksum."""
    rng = np.random.default_rng(0)
    path = tmp_path / "x.nerv"
    blob = sample.pack_tokens(torch.randn(48), bits, vae_sha256="0" * 64)
    stored = sample.unpack_tokens(blob)[1]
    refused = 0
    for i in range(400):
        if i % 2:
            altered = gzip.compress(mutate(rng, gzip.decompress(blob)))
        else:
            altered = mutate(rng, blob)
        path.write_bytes(altered)
        try:
            read = sample.read_nerv(path)[1]
            assert read.isfinite().all() if i % 2 else torch.equal(read, stored)
        except SystemExit as stop:
            refused += 1
            assert str(path) in str(stop.code) and "\n" not in str(stop.code)
    assert refused > 150


def test_a_nerv_file_takes_no_more_memory_than_it_may(tmp_path):
    """Catches a payload that unpacks to gigabytes, and sizes that are believed because the header says so."""
    path = tmp_path / "x.nerv"
    sound = dict(bits=8, low=0, scale=1.0)
    for change, payload, part in [
            (dict(), bytes(1 << 26), "larger than any"),
            (dict(scale="x"), bytes(7), "TypeError"),
            (dict(low=math.nan), bytes(7), "not numbers"),
            (dict(scale=1e300), b"1234567", "not numbers"),
            (dict(bits=32), b"12345", "size")]:
        head = json.dumps({**sound, **change}).encode()
        path.write_bytes(gzip.compress(head + b"\n" + payload))
        tracemalloc.start()
        with pytest.raises(SystemExit, match=part):
            sample.read_nerv(path)
        assert tracemalloc.get_traced_memory()[1] < 2e7
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------- loading, timing

def test_sampling_in_bfloat16(run, lively, monkeypatch, capsys):
    """Catches statistics that lose their digits, and a machine without a C compiler that cannot sample at all."""
    dit = nerv_dit.load_dit(lively, "cpu")
    mean = dit.token_mean.clone()

    def no_compiler(*_, **__):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(torch, "ones", lambda n, device: None)          # there is no CUDA here
    sample.ready_to_sample(dit, sample.Config(), SimpleNamespace(type="cuda"))
    assert {p.dtype for p in dit.parameters()} == {torch.bfloat16}
    assert torch.equal(dit.token_mean, mean) and dit.token_std.dtype == torch.float32
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "Failed to find C compiler." in told


def test_bench_runs(tmp_path, monkeypatch, capsys):
    """Catches a row of --bench that went out of date with the code it times, and operations that are not counted."""
    monkeypatch.setitem(nerv_vae.PRESETS, "ucf", TINY)
    monkeypatch.setitem(nerv_dit.PRESETS, "ucf", TINY_DIT)
    monkeypatch.setitem(generative_nerv.NERV_WIDTHS, "S", 8)
    monkeypatch.setattr(sample, "seconds", lambda call: call() is None or 0.25)
    out = run_sample(tmp_path, "--bench", "--model", "S", "--resolution", 128)
    about, *rows = json.loads((out / "bench.json").read_text())
    assert [row["name"].split(",")[0] for row in rows] == [
        "encode", "decode", "decode one clip", "one frame of 1280 x 720", "training step", "one pass of DiT",
        "training step", "2 DDPM steps"]
    named = {row["name"]: row for row in rows}
    plan = generative_nerv.layer_plan(nerv_vae.Config(**{**TINY, "model": "S"}))
    want = 4 * sum(layer.flops for layer in plan)
    assert 1 <= named["decode"]["tflop"] * 1e12 / want < 1.05                   # and the heads
    pass_of_dit = named["one pass of DiT"]["tflop"]
    assert named["training step, stage 2"]["tflop"] == pytest.approx(3 * pass_of_dit)
    assert named["2 DDPM steps, guidance 2"]["tflop"] == pytest.approx(4 * pass_of_dit)
    assert named["2 DDPM steps, guidance 2"]["latency_s"] == 0.25 and about.startswith("S, 32 x 32")


def test_sample_bad_input_is_one_line(run, by_image, tmp_path, monkeypatch):
    """Catches tracebacks and settings that are ignored: one line that names the fix; bad values of a flag exit with 2."""
    clip = str(tmp_path / "no.mp4")
    for words, part in [
            (["--dit", "no.pt"], "python nerv_dit.py"),
            (["--dit", run.dit, "--vae", "no.pt"], "--vae"),
            (["--dit", run.dit, "--vae", run.dit], "made by"),
            (["--dit", run.dit, "--classes", "dragon"], "the classes are 0 ball"),
            (["--dit", by_image, "--classes", "0"], "no classes"),
            (["--dit", by_image, "--guidance", 2], "--guidance"),
            (["--dit", run.dit, "--predict", clip], "--condition frames"),
            (["--dit", by_image, "--predict", clip], "no readable clip"),
            (["--vae", run.vae, "--compress", clip], "no readable clip"),
            (["--vae", run.vae, "--decompress", clip], "No such file"),
            (["--vae", run.vae, "--reconstruct", "--out", f"{run.vae}/x"], "cannot write")]:
        with pytest.raises(SystemExit) as stop:
            sample.main(["--out", str(tmp_path / "out"), *map(str, words)])
        assert part in str(stop.value.code) and "\n" not in str(stop.value.code)
    for words in ("n=0 batch=-1 fps=0 seed=-1 seed=9223372036854775808 bits=3 guidance=nan "
                  "sample-steps=1001 long=0 mp4=-1 time-interp=-2").split():
        with pytest.raises(SystemExit) as stop:
            sample.main([f"--{words}"])
        assert stop.value.code == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        sample.main([])
