"""Tests of everything: contracts, known answers, behaviour, end to end. CPU, offline: pytest test_smoke.py

Each docstring names the bug that the test would catch. What needs real footage looks for it in ../shared/data and is
skipped where that is absent.
"""
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import generative_nerv
import nerv_dit
import nerv_vae
import sample

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
    assert generative_nerv.positional_embedding(torch.arange(5.0), 8, 16).shape == (5, 48, 8, 8)
    dit = nerv_dit.DiT(nerv_dit.Config(**TINY_DIT), 6, 8, classes=5)
    assert dit(mean, torch.tensor([0, 5, 999]), torch.tensor([0, 4, 5])).shape == mean.shape


def test_frames_decode_independently():
    """Catches time mixed up with the batch: a frame must not depend on which other frames are asked for."""
    model, z = generative_nerv.GenerativeNeRV(tiny()), torch.randn(2, 6, 8)
    whole = model(z, torch.arange(4.0))
    torch.testing.assert_close(model(z, torch.tensor([3.0, 1.0])), whole[:, [3, 1]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(z.flip(0), torch.arange(4.0)), whole.flip(0), rtol=1e-4, atol=1e-5)


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


VARIANTS = [{}, *[dict(parameterization=p) for p in ("fmm", "repeat")], *[dict(reuse=r) for r in ("none", "direct")],
            *[dict(upsample=u) for u in ("pixelshuffle", "bilinear")], *[dict(side=s) for s in ("skip", "none")],
            *[dict(pe_size=s) for s in (1, 4, 16)], dict(model="6", gen_channels=16), dict(tokens=23, token_dim=5)]


@pytest.mark.parametrize("change", VARIANTS, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "default")
def test_every_decoder_variant(change):
    """Catches a variant whose plain CNN differs, that starts dead or exploding, or that leaves parameters untrained."""
    torch.manual_seed(0)
    cfg = tiny(**{"model": "24", "gen_channels": 8, "tokens": 20, **change})
    net, z = generative_nerv.GenerativeNeRV(cfg), torch.randn(3, cfg.tokens, cfg.token_dim)
    frame = torch.tensor([0., 1.5, 9.])
    maps = []
    for conv in net.convs:
        conv.register_forward_hook(lambda m, i, out: maps.append(out.square().mean().sqrt().item()))
    video = net(z, frame)
    assert 0.2 < min(maps) and max(maps) < 3.5
    for b in range(3):                                  # a group order or an offset gone wrong shows here
        torch.testing.assert_close(net.instantiate(z[b])(frame), video[b], rtol=1e-3, atol=1e-4)
    (video * torch.randn_like(video)).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize("kind", ["conv", "transposed", "bilinear"])
def test_factored_convolution_is_a_loop_over_videos(kind):
    """Catches wrong groups, a block at the wrong channels, a norm over the wrong axes: compare with plain loops."""
    torch.manual_seed(0)
    T, B, c_in, c_out, go, gi, k = 2, 3, 6, 10, 4, 2, 4 if kind == "transposed" else 3
    layer = generative_nerv.Layer(kind, c_in, c_out, k, 8, go, gi, 0)
    conv = generative_nerv.ModulatedConv2d(layer, tiny(), slice(0, 6))
    x, z = torch.randn(T * B, c_in, 8, 8), torch.randn(B, 6, 8)
    with torch.no_grad():
        conv.bias.normal_()
        out = conv(x, z).view(T, B, c_out, *(8 if kind == "conv" else 16,) * 2)
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


def test_interpolated_tokens_are_interpolated_kernels():
    """Catches a non-linear step between tokens and kernels, which would break weight interpolation (Sec. 4.5.2)."""
    conv, a, b = generative_nerv.GenerativeNeRV(tiny()).convs[3], torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    torch.testing.assert_close(conv.generated(0.3 * a + 0.7 * b), 0.3 * conv.generated(a) + 0.7 * conv.generated(b))


# ---------------------------------------------------------------------------------------------- known answers: losses

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


def test_loss_is_zero_for_the_exact_denoiser_and_in_both_passes():
    """Catches a loss and a sampler that disagree on time, and a second pass whose target forgets the true tokens."""
    point, schedule = torch.randn(1, 4, 8), nerv_dit.noise_schedule()
    t, tokens = torch.tensor([1, 300, 999]), point.expand(3, -1, -1)
    for own_step in (0, 1):
        assert nerv_dit.diffusion_loss(OnePoint(point), tokens, t, torch.zeros(3), schedule, 5.0, own_step) < 1e-6
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


def test_split_keeps_groups_apart(tree, tmp_path):
    """Catches a split by clip, which leaks: clips of one group are cut from one source video."""
    train, held = (data.build_dataset(folder_config(tree, tmp_path, split="train"), held_out=h) for h in (False, True))
    groups = [{data.group_of(p.relative_to(tree)) for p in d.files} for d in (train, held)]
    assert not groups[0] & groups[1] and {9, 10} <= groups[0] and {1, 2} <= groups[1]
    assert data.split_groups("1-3,7") == {1, 2, 3, 7} and len(data.split_groups("all")) == 25


def test_clips_are_shaped_scaled_and_mirrored(tree, tmp_path):
    """Catches [0, 1] pixels, a crop off the centre, a flip in time, and clips that ignore their seed."""
    ramp = np.zeros((1, 40, 80, 3), np.uint8)
    ramp[:, :, 40:] = 255                               # right half white: a centred square crop is half white
    clip = data.to_clip(ramp, 20)
    assert clip.shape == (1, 3, 20, 20) and clip.min() == -1 and clip.max() == 1 and abs(clip.mean()) < 0.06
    videos = data.build_dataset(folder_config(tree, tmp_path, flip=True))
    assert torch.equal(videos[0, 5][0], videos[0, 5][0])
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
    assert data.to_uint8(torch.full((3, 1, 1), 0.996))[0, 0, 0] == 255              # 254.49.. + 0.5: rounded, not cut


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


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_resume_is_exact(run, tmp_path, stage):
    """Catches an unsaved optimizer, EMA or step, and clips or noise that start over: 2 + 2 steps are 4 steps."""
    main, base = {"vae": (nerv_vae.main, flags({**TINY, "steps": 4})),
                  "dit": (nerv_dit.main, ["--vae", str(run.vae), *flags({**TINY_DIT, "steps": 4})])}[stage]
    whole = torch.load(main([*base, "--out", str(tmp_path / "whole")]), weights_only=True)
    keep = nerv_vae.save_checkpoint if stage == "vae" else nerv_dit.save_checkpoint

    class Stop(Exception):
        pass

    def save_then_stop(path, state):
        keep(path, state)
        if state["step"] == 2:
            raise Stop

    module = nerv_vae if stage == "vae" else nerv_dit
    module.save_checkpoint = save_then_stop
    try:
        with pytest.raises(Stop):
            main([*base, "--out", str(tmp_path / "halves")])
    finally:
        module.save_checkpoint = keep
    resumed = torch.load(main([*base, "--out", str(tmp_path / "halves")]), weights_only=True)
    assert resumed["step"] == whole["step"] == 4
    for part in ("model", "ema"):
        for name, value in whole[part].items():
            assert torch.equal(value, resumed[part][name]), f"{part}.{name} differs after resuming"


def test_resume_refuses_other_settings(run):
    """Catches a run that silently goes on with another model."""
    with pytest.raises(SystemExit, match="--token-dim 8 .now 7."):
        nerv_vae.main(["--out", str(run.vae.parent), *flags({**TINY, "token_dim": 7, "steps": 3})])


def test_gan_and_perceptual_losses_train(tmp_path, monkeypatch):
    """Catches a critic that never steps or an R1 term without gradient; LPIPS is a stand-in with random weights."""
    import lpips
    real = lpips.LPIPS
    monkeypatch.setattr(lpips, "LPIPS", lambda net, verbose: real(net="squeeze", pnet_rand=True, verbose=False))
    settings = {**TINY, "frames_per_step": 0, "gan_weight": 1.0, "gan_every": 1, "r1_weight": 1.0, "lpips_weight": 1.0,
                "batch": 2}
    path = nerv_vae.main(["--out", str(tmp_path), *flags(settings)])
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert {"gan", "lpips", "d_real", "d_fake"} <= set(row) and all(math.isfinite(v) for v in row.values())
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


# ---------------------------------------------------------------------------------------------- end to end

def test_readme_commands(run, tmp_path):
    """Catches a stage that cannot read what the one before it wrote, and output files that are not there."""
    out = sample.main(["--dit", str(run.dit), "--out", str(tmp_path), "--n", "5", "--batch", "3", "--interp",
                       "--time-interp", "3", "--extrapolate", "2"])
    with np.load(out / "samples.npz") as file:
        assert file["videos"].shape == (5, 4, 32, 32, 3) and file["videos"].dtype == np.uint8
        assert file["labels"].tolist() == [0, 1, 2, 3, 4]
        assert json.loads(str(file["settings"]))["sample_steps"] == 3
    for name in ("samples.gif", "samples.png", "interp.gif", "interp.png", "time_interp.gif", "extrapolate.png"):
        assert (out / name).stat().st_size > 100
    assert len(list(out.glob("*.mp4"))) == 5 and data.count_frames(out / "time_interp.gif") == 12


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


def test_one_line_for_bad_input(run, tmp_path):
    """Catches tracebacks: each mistake gets one line that names the fix, exit code 1."""
    for main, words, part in [
            (nerv_dit.main, ["--vae", str(tmp_path / "no.pt")], "python nerv_vae.py"),
            (sample.main, ["--dit", str(tmp_path / "no.pt")], "python nerv_dit.py"),
            (sample.main, ["--dit", str(run.dit), "--classes", "dragon"], "the classes are"),
            (sample.main, ["--dit", str(run.dit), "--predict", "x.mp4"], "--condition frames"),
            (nerv_vae.main, ["--resolution", "48", "--out", str(tmp_path)], "change --"),
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
