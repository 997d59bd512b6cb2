"""From checkpoints to videos: generate, interpolate, look between frames, predict, compress.

    python sample.py                       # 16 videos in out/samples: mp4, samples.gif, samples.npy
    python sample.py --weights assets/toy  # this, and all below, with the weights that came along
    python sample.py --film                # film.gif: noise becomes weights, weights become video
    python sample.py --interp              # and the way from one video's weights to another's
    python sample.py --time-interp 8       # and one of them with 8 frames for every trained one
    python sample.py --extrapolate         # and as many frames again beyond the last trained one
    python sample.py --interp --video-a a.mp4 --video-b b.mp4       # the way between two files
    python sample.py --n 2048 --out out/eval     # for fvd.py; stopped and started again, it goes on
    python sample.py --n 2048 --long 8     # the same with 8 frames for every trained one in all
    python sample.py --reconstruct --n 256       # clips that did not train, and what comes back
    python sample.py --predict clip.mp4    # its future (nerv_dit.py --condition frames|image|edge)
    python sample.py --compress clip.mp4   # a video as a few kilobytes: clip.nerv
    python sample.py --decompress out/samples/clip.nerv             # and back: clip.nerv.mp4, .gif
    python sample.py --bench --model S     # how fast this machine runs the paper's sizes

Letters: n videos, k of them at once, T frames, H = W = R pixels, N weight tokens, d channels each.
         lambda: 1 is video a, 0 is video b.
Ranges:  pixels are in [-1, 1]; samples.npy holds uint8. mp4 and gif are lossy, for eyes only.
Each mode is one function of the settings and of what was loaded: MODES lists them, main calls them.
"""
import json
import os
import re
import unicodedata
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import nerv_dit
import nerv_vae
from data import Videos, save_video, tile
from generative_nerv import positional_embedding, render
from nerv_dit import denoise_steps, sample_tokens


@dataclass(frozen=True)
class Config:
    """Settings of sample.py; sizes, classes and data come from the checkpoints."""

    # what
    n: int = 16                     # 1..: videos
    classes: str = ""               # names or numbers with commas between, in turn; empty: all
    long: int = 1                   # 1..: frames for every trained one, of all (Tables A9, A10: 8)
    mp4: int = 64                   # 0..: how many videos become an mp4 too, which VBench reads
    film: bool = False              # the sampler at work: noise becomes weights and video
    interp: bool = False            # interpolate two videos' weights (Sec. 4.5.2, Fig. A2)
    video_a: str = ""               # a file to interpolate from, not the first generated video
    video_b: str = ""               # a file to interpolate to, not the last generated video
    time_interp: int = 0            # 0..: frames for every trained one, of one video (Fig. A1: 8)
    extrapolate: bool = False       # as many frames again beyond the last one (Sec. 4.5.1)
    reconstruct: bool = False       # encode and decode n clips that did not train
    predict: str = ""               # a video file to continue, animate or redraw (Sec. 4.3, E.7)
    compress: str = ""              # a video file that becomes a .nerv file (NeRV-Enc A.4)
    bits: int = 8                   # 4|5|6|7|8|32: of a number in it; 32 keeps float32
    decompress: str = ""            # a .nerv file to play
    export: str = ""                # write NAME-vae.pt and NAME-dit.pt in half precision
    # how
    sampler: str = "auto"           # auto|ddpm|ddim: auto is as the DiT was configured
    sample_steps: int = 0           # 0..1000: from noise to tokens; 0: as the DiT was configured
    guidance: float = 0.0           # 0..: 1 is off; 0: as the DiT was configured
    batch: int = 0                  # 0..: videos at once; 0: 16, and 1 with --bench (paper E.1)
    seed: int = 0                   # 0..4294967295: fixes the noise of every video
    compile: bool = True            # on CUDA: the sampling step compiled and replayed as a graph
    # where
    dit: str = "out/dit/ckpt.pt"    # checkpoint of nerv_dit.py
    vae: str = ""                   # of nerv_vae.py; empty: the DiT's, or out/vae/ckpt.pt
    weights: str = ""               # NAME of exported ones instead of --dit and --vae; assets/toy
    data_root: str = ""             # folder of videos that moved, or of others that did not train
    out: str = "out/samples"        # folder that everything is written to
    fps: int = 8                    # 1..1000: frames a second of mp4 and gif
    device: str = "auto"            # auto|cpu|cuda: what computes
    # how fast
    bench: bool = False             # time the paper's sizes, random weights (Tables A2, A3, E.16)
    model: str = "S"                # S|B|L: decoder that --bench times
    resolution: int = 128           # 128|256: pixels of the clips that --bench times


# -------------------------------------------------------------------------------------------- modes

def generate(cfg, out, vae, dit):
    """n videos into samples.npy, their tokens beside them; the first also as mp4, gif and sheet.

    --long 8 asks every network for frames 0, 1/8 .. T - 1/8, the last 7 beyond the trained ones.
    Source:  paper (Tables A9, A10, E.3): 16 frames trained at stride 8, 128 decoded
    """
    frame = torch.arange(vae.cfg.frames * cfg.long, device=vae.device) / cfg.long
    asked = Asked(cfg, vae, dit, cfg.n)
    settings = dict(clip_settings(vae, cfg.long), kind="samples", n=cfg.n, seed=cfg.seed,
                    labels_drawn="in turn", asked=cfg.classes, condition=asked.condition,
                    dit_sha256=dit.sha256, dit_step=dit.step, **dit.how)
    path = out / "samples.npy"
    store = Videos.create(path, settings, asked.classes)
    batches = range(store.done, cfg.n, cfg.batch)
    for first in data.progress(batches, desc="generating", unit="batch"):
        last = min(first + cfg.batch, cfg.n)
        tokens = draw(cfg, dit, asked, first, last)                          # (k, N, d)
        store.add(vae.play(tokens, frame), asked.labels[first:last], tokens)
    store.close()
    show_samples(cfg, out, Videos.open(path))


def interpolate(cfg, out, vae, dit):
    """lambda * a + (1 - lambda) * b on the tokens of two videos.

    interp.gif and interp.png show 9 lambdas, interp_sheet.png holds 25 for the sliders of the page.
    Source:  paper (Sec. 4.5.2): kernels go straight, then are normalised
    """
    a, b = two_ends(cfg, out, vae)                                                # (N, d) each
    lam = torch.linspace(1, 0, 25, device=vae.device)[:, None, None]         # (25, 1, 1)
    videos = vae.play(lam * a + (1 - lam) * b)                           # (25, T, 3, R, R)
    T = videos.shape[1]
    R = videos.shape[-1]
    sheet = videos.permute(2, 1, 3, 0, 4).reshape(1, 3, T * R, 25 * R)          # time goes down
    save_video(out / "interp_sheet.png", sheet)
    about = dict(columns=len(videos), rows=T, width=R, height=R)
    data.write_file(out / "interp_sheet.json", json.dumps(about).encode())
    names = [f"lambda {value:.3g}" for value in lam[::3].flatten().tolist()]
    save_video(out / "interp.gif", tile(videos[::3], 9, names), cfg.fps)
    save_video(out / "interp.png", strips(videos[::3], names))
    print(f"wrote {out}/interp.gif and .png: from lambda 1 to 0; with sliders in index.html")


def render_times(cfg, out, vae, dit):
    """The first video's weights asked for frames between and beyond the trained (Sec. 4.5.1)."""
    T = vae.cfg.frames
    k = max(cfg.time_interp, 1)
    tokens = two_ends(cfg, out, vae)[:1]                                          # (1, N, d)
    frame = torch.arange(2 * T * k, device=vae.device) / k                   # 0, 1/k .. 2T - 1/k
    if cfg.time_interp:
        video = vae.play(tokens, frame[:T * k])[0]                       # (T k, 3, R, R)
        save_video(out / "time_interp.gif", video, cfg.fps * k)
        labels = [f"t = {t:.3g}" for t in frame[:4 * k]]
        save_video(out / "time_interp.png", tile(video[:4 * k, None], k, labels))
        print(f"wrote {out}/time_interp.gif and .png: {k} frames for every trained one")
    if cfg.extrapolate:
        video = vae.play(tokens, frame[::k])[0]                          # (2T, 3, R, R)
        save_video(out / "extrapolate.gif", video, cfg.fps)
        labels = [f"frame {t}" for t in range(2 * T)]
        save_video(out / "extrapolate.png", tile(video[:, None], T, labels))
        print(f"wrote {out}/extrapolate.gif and .png: frames {T} to {2 * T - 1} never trained")


def predict(cfg, out, vae, dit):
    """From a real video what the DiT learned to make: its future, its motion, or its colours."""
    kind = dit.cfg.condition
    if not dit.by_tokens:
        raise SystemExit(f"{dit.path} was trained with --condition {kind}; --predict needs a DiT "
                         "trained with --condition frames, image or edge")
    clip = file_tokens(cfg.predict, vae)[1]                                  # (T, 3, R, R)
    shown = data.condition_video(clip, kind)                                    # (T, 3, R, R)
    told = vae.encode(shown[None].to(vae.device))[0]                  # (1, N, d)
    told = told.expand(cfg.n, -1, -1)
    videos = [clip[None], shown[None]]
    for first in range(0, cfg.n, cfg.batch):
        tokens = draw(cfg, dit, told, first, min(first + cfg.batch, cfg.n))  # (k, N, d)
        videos.append(vae.play(tokens))
    videos = torch.cat(videos)                                                  # (2+n, T, 3, R, R)
    names = ["the video", f"shown: {kind}"] + [f"answer {i}" for i in range(cfg.n)]
    save_video(out / "predict.gif", tile(videos, 6, names), cfg.fps)
    save_video(out / "predict.png", strips(videos[:8], names))
    print(f"wrote {out}/predict.gif and .png: the video, what was shown, {cfg.n} answers")


def reconstruct(cfg, out, vae, dit):
    """Clips that did not train and what comes back: original.npy and reconstruction.npy, a pair."""
    clips, which = unseen_clips(cfg, vae)
    chosen = np.random.default_rng(cfg.seed).permutation(len(clips))[:cfg.n]    # one clip a video
    settings = dict(clip_settings(vae), which=which, seed=cfg.seed,
                    pair=f"{vae.sha256[:12]}-{cfg.seed}-{len(chosen)}")
    stores = []
    for kind in ("original", "reconstruction"):
        path = out / f"{kind}.npy"
        stores.append(Videos.create(path, dict(settings, kind=kind), clips.classes))
    batches = range(min(store.done for store in stores), len(chosen), cfg.batch)
    for first in data.progress(batches, desc="reconstructing", unit="batch"):
        part = chosen[first:first + cfg.batch].tolist()
        video = torch.stack([clips[i, i][0] for i in part])                     # (k, T, 3, R, R)
        given = data.degrade(video.to(vae.device), vae.cfg.degrade)
        recon = vae.play(vae.encode(given)[0])                                  # (k, T, 3, R, R)
        for store, kept in zip(stores, (video, recon)):
            new = store.done - first                    # a stop between the two leaves one ahead
            if new < len(part):
                store.add(kept[new:], clips.labels[part[new:]])
    for store in stores:
        store.close()
    show_pair(cfg, out, which)


def compress(cfg, out, vae, dit):
    """A video's first clip as a .nerv file; prints what each number of bits costs and keeps."""
    tokens, clip = file_tokens(cfg.compress, vae)                        # (N, d), (T, 3, R, R)
    if not tokens.isfinite().all():
        raise SystemExit(f"the tokens of {cfg.compress} are not finite; train the tokenizer again")
    T = len(clip)
    R = clip.shape[-1]
    used = vae.decoder.used                                                     # (N, d)
    videos = [clip]
    names = ["the video"]
    print(" bits    bytes   bits/pixel   PSNR dB")
    for bits in (4, 5, 6, 7, 8, 32):
        blob = pack_tokens(tokens[used], bits, vae_sha256=vae.sha256, frames=T, resolution=R)
        video = play_numbers(unpack_tokens(blob)[1], vae)                    # (T, 3, R, R)
        quality = data.psnr(video, clip).mean()
        print(f"{bits:5d} {len(blob):8d} {8 * len(blob) / (T * R * R):12.4f} {quality:9.2f}")
        videos.append(video)
        names.append(f"{bits} bits, {len(blob)} bytes")
        if bits == cfg.bits:
            path = out / (Path(cfg.compress).stem + ".nerv")
            data.write_file(path, blob)
    save_video(out / "compress.png", strips(torch.stack(videos), names))
    print(f"wrote {path} at {cfg.bits} bits: {T} frames of {R} x {R}; and compress.png")


def decompress(cfg, out, vae, dit):
    """Play a .nerv file through the tokenizer that made it, into an mp4 and a gif."""
    header, numbers = read_nerv(cfg.decompress)
    made_by = str(header.get("vae_sha256"))
    if made_by != vae.sha256 or len(numbers) != vae.decoder.used.sum():
        raise SystemExit(f"{cfg.decompress} was made by another tokenizer than {vae.path} (its "
                         f"sha256 starts {made_by[:12]!r}, not {vae.sha256[:12]!r}); give that one "
                         "with --vae")
    video = play_numbers(numbers, vae)                                       # (T, 3, R, R)
    path = out / Path(cfg.decompress).name       # clip.nerv.mp4: clip.mp4 is the original's
    for suffix in (".mp4", ".gif"):
        save_video(path.with_name(path.name + suffix), video, cfg.fps)
    print(f"wrote {path}.mp4 and .gif: {len(video)} frames of {vae.cfg.resolution} pixels a side")


def film(cfg, out, vae, dit):
    """The sampler at work, film.gif: tokens turn from noise to weights, beside what they decode to.

    Up to 6 videos and 50 steps. The clip runs to and fro meanwhile, and for three seconds after.
    """
    n = min(cfg.n, 6)
    asked = Asked(cfg, vae, dit, n)
    noise = noise_for(0, n, dit, cfg.seed)                                      # (n, N, d)
    walk = list(denoise_steps(dit, asked[0:n], noise, seed=noise_seed(cfg.seed, 0), quiet=False,
                              **dit.how))
    every = -(-len(walk) // 50)
    walk = walk[::-1][::every][::-1]                    # the last one always
    names = [asked.classes[label] for label in asked.labels]
    turn = max(vae.cfg.frames - 1, 1)
    sheets = []
    for i in range(len(walk) + 38):
        step = min(i + 1, len(walk))
        z, guess = walk[step - 1]                                               # (n, N, d) each
        time = i * cfg.fps / 12.5 % (2 * turn)
        time = min(time, 2 * turn - time)                                       # 0 .. T-1 .. 0 ..
        videos = vae.play(guess, torch.tensor([time], device=vae.device))[:, 0]
        tokens = (z - dit.token_mean) / dit.token_std
        sheets.append(film_sheet(tokens.cpu(), videos, names, step / len(walk)))
    save_video(out / "film.gif", data.from_uint8(np.stack(sheets)), 12.5)
    print(f"wrote {out}/film.gif: {len(walk)} steps from noise to weights, and to video")


def export(cfg, out, vae, dit):
    """The averaged weights of both stages in half precision, without optimizers: to hand on."""
    vae_path = Path(f"{cfg.export}-vae.pt")
    dit_path = Path(f"{cfg.export}-dit.pt")
    write_half(vae_path, vae, config=asdict(vae.cfg), classes=vae.classes, made_by=nerv_vae.MADE_BY)
    write_half(dit_path, dit, config=asdict(replace(dit.cfg, vae=str(vae_path))),
               classes=dit.class_names, made_by=nerv_dit.MADE_BY,
               tokens=list(dit.token_mean.shape), vae_sha256=data.file_hash(vae_path))
    print(f"wrote {vae_path} and {dit_path}; use them with --weights {cfg.export}")


def bench(cfg, out, vae, dit):
    """Time the paper's sizes with random weights on this machine.

    Source:  paper (Tables A2, A3, E.16), and one training step of each stage
             departs (E.1 averages 100 calls): the median of what fits into 3 seconds; no LPIPS, no
             GAN; bfloat16 and torch.compile on CUDA only
    """
    device = nerv_vae.pick_device(cfg.device)
    B = cfg.batch or 1
    preset = "ucf256" if cfg.resolution == 256 else "ucf"
    c = nerv_vae.Config(**dict(nerv_vae.PRESETS[preset], model=cfg.model, checkpointing=False))
    dc = nerv_dit.Config(**nerv_dit.PRESETS[preset])
    table = Table(device, f"{c.model}, {c.resolution} x {c.resolution}, batch {B}")
    vae = nerv_vae.NeRVVAE(c).to(device).eval()
    video = torch.zeros(B, c.frames, 3, c.resolution, c.resolution, device=device)
    z = torch.randn(B, c.tokens, c.token_dim, device=device)
    frame = torch.arange(c.frames, device=device).float()

    encoding = table.module("encode", vae.encoder, video)
    decoding = table.module("decode", vae.decoder, z, frame)
    net = vae.decoder.instantiate(z[0])
    table.module("decode one clip, instantiated", net, frame)
    cell = c.resolution // c.pe_size                    # convolutions do not mind the grid's size
    x = positional_embedding(frame[:1], 1280 // cell)[:, :, :720 // cell]       # (1, 48, 45, 80)
    x = x.contiguous(memory_format=torch.channels_last)
    table.row(f"one frame of 1280 x {x.shape[2] * cell}, instantiated", net,
              lambda: render(net.layers, net.convs, x, c.side),
              decoding / B / c.frames * x[0, 0].numel() / c.pe_size ** 2)

    def stage1():
        recon, mean, logvar = vae(video, frame, z)
        return F.mse_loss(recon, video) + nerv_vae.kl_divergence(mean, logvar).mean()

    table.training("training step, stage 1", vae.train(), stage1, encoding + decoding)
    dit = nerv_dit.DiT(dc, c.tokens, c.token_dim, 101).to(device)
    t = torch.full((B,), 500, device=device)
    cond = torch.zeros_like(t)
    noise = torch.randn(2, *z.shape, device=device)
    denoising = table.module("one pass of DiT", dit, z, t, cond)
    schedule = nerv_dit.noise_schedule(device)

    def stage2():
        return nerv_dit.diffusion_loss(dit, z, noise, t, cond, schedule, dc.min_snr_gamma)

    table.training("training step, stage 2", dit, stage2, denoising)
    ready_to_sample(dit, cfg, device)
    for sampler, steps in (("ddpm", 250), ("ddim", 50)):
        timed = steps if device.type == "cuda" else 2
        table.row(f"{steps} {sampler} steps, guidance 2", dit,
                  lambda: sample_tokens(dit, cond, z, sampler, timed, 2.0),
                  2 * steps * denoising, steps // timed)
    data.write_file(out / "bench.json", json.dumps(table.rows, indent=1).encode())


# flag: what it calls, and what must be loaded for it; "samples" are those of the same command
MODES = {
    "bench": (bench, "nothing"),
    "compress": (compress, "vae"),
    "decompress": (decompress, "vae"),
    "reconstruct": (reconstruct, "vae"),
    "export": (export, "both"),
    "film": (film, "both"),
    "predict": (predict, "both"),
    "interp": (interpolate, "samples"),
    "time_interp": (render_times, "samples"),
    "extrapolate": (render_times, "samples"),
}


@torch.no_grad()
def main(argv=None):
    """Command line of sample.py. Returns the folder written to."""
    data.alone("sample.py")
    cfg = data.parse_config(Config, {}, argv)
    modes = [MODES[flag] for flag in MODES if getattr(cfg, flag)]
    if not modes or "samples" in dict(modes).values():
        modes.insert(0, (generate, "samples"))
    with data.claim(cfg.out):
        vae, dit = load(cfg, {need for _, need in modes})
        if not cfg.bench:
            cfg = replace(cfg, batch=cfg.batch or 16)
        try:
            for mode, _ in dict.fromkeys(modes):        # render_times once, for whichever flags
                mode(cfg, Path(cfg.out), vae, dit)
        except KeyboardInterrupt:
            raise SystemExit("stopped; the same command goes on with clips on disk") from None
        data.write_page(cfg.out, "sample.py", asdict(cfg))
    return Path(cfg.out)


# -------------------------------------------------------------------------- The method ends here
# Below: what is asked for, checkpoints, pictures, .nerv files, the table of --bench.

class Asked:
    """What each of n videos is made from: its class, nothing, or a clip that did not train.

    Shapes:  self[first:last] -> what DiT is told, (k,) or (k, N, d); .labels (n,) into .classes
    """

    def __init__(self, cfg, vae, dit, n):
        self.vae = vae
        self.dit = dit
        self.condition = dit.cfg.condition
        self.classes = ["video"]
        self.labels = np.zeros(n, int)
        self.told = torch.full((n,), dit.classes, device=vae.device)    # no class
        if self.condition == "class":
            self.classes = dit.class_names
            self.labels = pick_labels(cfg.classes, self.classes, n)
            self.told = self.told.new_tensor(self.labels)
        elif dit.by_tokens:
            self.clips, which = unseen_clips(cfg, vae)
            order = np.random.default_rng(cfg.seed).permutation(len(self.clips))
            self.keys = [(int(i), seed) for seed, i in enumerate(np.resize(order, n))]  # in turn
            self.classes = self.clips.classes
            self.labels = self.clips.labels[np.resize(order, n)]
            self.condition += f" of {which} clips"

    def __getitem__(self, part):
        if not self.dit.by_tokens:
            return self.told[part]                                              # (k,)
        video = torch.stack([self.clips[key][0] for key in self.keys[part]])    # (k, T, 3, R, R)
        shown = data.condition_video(video.to(self.vae.device), self.dit.cfg.condition)
        return self.vae.encode(shown)[0]                                        # (k, N, d)


def pick_labels(wanted, names, n):
    """n class numbers from "ring sliding,3", in turn; a name may hold commas, the longest one wins.

    Raises:  SystemExit that lists the classes
    """
    known = {str(i): i for i in range(len(names))}
    known.update((unicodedata.normalize("NFC", name), i) for i, name in enumerate(names))
    wanted = unicodedata.normalize("NFC", wanted)
    words = "|".join(re.escape(word) for word in sorted(known, key=len, reverse=True))
    entry = rf"\s*({words})\s*(?:,|$)"
    left = re.sub(entry, "", wanted).strip(" ,")
    if left:
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        raise SystemExit(f"no class {left!r}; the classes are {listed}")
    chosen = [known[word] for word in re.findall(entry, wanted)]
    return np.resize(chosen or range(len(names)), n)


def noise_seed(seed, i):
    """Seed of video i's noise, which does not depend on the batch it is in."""
    return seed * 1_000_003 + i


def noise_for(first, last, dit, seed):
    """Starting noise of videos first..last-1. Shapes: -> (k, N, d)."""
    noise = []
    for i in range(first, last):
        generator = torch.Generator().manual_seed(noise_seed(seed, i))
        noise.append(torch.randn(dit.token_mean.shape, generator=generator))
    return torch.stack(noise).to(dit.token_mean.device)


def draw(cfg, dit, told, first, last):
    """Tokens of videos first..last-1, told[first:last] to DiT. Shapes: -> (k, N, d)."""
    noise = noise_for(first, last, dit, cfg.seed)
    return sample_tokens(dit, told[first:last], noise, seed=noise_seed(cfg.seed, first),
                         quiet=cfg.n > cfg.batch, **dit.how)


def file_tokens(path, vae):
    """Mean tokens of the first clip of a video file. Shapes: -> (N, d), clip (T, 3, R, R)."""
    c = vae.cfg
    stride = c.stride
    try:
        if stride == 0:                                 # the clip spreads over the whole video
            stride = max((data.count_frames(path) - 1) // max(c.frames - 1, 1), 1)
        clip = data.read_clip(path, 0, c.frames, stride, c.resolution)
    except Exception as error:                          # hostile files raise anything
        raise SystemExit(f"{path} has no readable clip of {c.frames} frames at stride {stride} "
                         f"({error})") from error
    return vae.encode(clip[None].to(vae.device))[0][0], clip


def two_ends(cfg, out, vae):
    """Tokens of --video-a, else the first sample, and --video-b, else the last. -> (2, N, d)."""
    tokens = Videos.open(out / "samples.npy").tokens
    ends = torch.tensor(tokens[[0, -1]], device=vae.device)
    for end, path in zip(ends, (cfg.video_a, cfg.video_b)):
        if path:
            end.copy_(file_tokens(path, vae)[0])
    return ends


def unseen_clips(cfg, vae):
    """Clips that did not train, never mirrored, and what to call them.

    Held-out ones of stage 1's folder; all of it where all trained; all of another --data-root.
    A folder that only moved is told by its files: stage 1's index knows their names and sizes.
    """
    about = replace(vae.cfg, flip=False, out=cfg.out)
    if cfg.data_root:
        about = replace(about, data_root=cfg.data_root)
    known = data.read_checked(vae.path.with_name("index.json"))
    if known:
        root, files, _ = data.find_videos(about)
        sizes = {str(path.relative_to(root)): path.stat().st_size for path in files}
        if all(known[name]["size"] != sizes[name] for name in known.keys() & sizes):
            return data.build_dataset(replace(about, split="all")), "unseen"
        about = replace(about, out=str(vae.path.parent))        # no need to look through them again
    clips = data.build_dataset(about, held_out=True)
    if len(clips):
        return clips, "held-out"
    return data.build_dataset(about), "training"


def clip_settings(vae, long=1):
    """What a measurement must know about clips with `long` frames for every trained one."""
    c = vae.cfg
    stride = c.stride / long
    if stride.is_integer():
        stride = int(stride)
    return dict(dataset=c.dataset, frames=c.frames * long, stride=stride, resolution=c.resolution,
                split=c.split, vae_sha256=vae.sha256, vae_step=vae.step)


# ------------------------------------------------------------------------------------------ loading

def load(cfg, needs):
    """The checkpoints that the modes need, checked against each other and against the flags."""
    device = nerv_vae.pick_device(cfg.device)
    dit = None
    if cfg.weights:
        cfg = replace(cfg, dit=f"{cfg.weights}-dit.pt", vae=f"{cfg.weights}-vae.pt")
    if needs == {"nothing"}:
        return None, None
    if needs & {"both", "samples"}:
        dit = nerv_dit.load_dit(cfg.dit, device)
        cfg = replace(cfg, vae=cfg.vae or dit.cfg.vae)
    vae = nerv_vae.load_vae(cfg.vae or "out/vae/ckpt.pt", device)
    vae.device = device
    if dit:
        if vae.sha256 != dit.vae_sha256:
            raise SystemExit(f"{cfg.dit} was trained on another tokenizer than {vae.path} (its "
                             f"sha256 starts {dit.vae_sha256[:12]}, not {vae.sha256[:12]}); say "
                             "with --vae where that one is")
        dit.how = how_to_sample(cfg, dit)
        if not cfg.export:
            ready_to_sample(dit, cfg, device)
    return vae, dit


def how_to_sample(cfg, dit):
    """Sampler, steps and guidance: the flags', else those that the DiT was configured with."""
    how = dict(sampler=cfg.sampler, steps=cfg.sample_steps or dit.cfg.sample_steps,
               guidance=cfg.guidance or dit.cfg.guidance)
    if cfg.sampler == "auto":
        how["sampler"] = dit.cfg.sampler
    if dit.cfg.condition != "class":
        if cfg.classes or cfg.guidance not in (0, 1):
            raise SystemExit(f"{cfg.dit} was trained with --condition {dit.cfg.condition}: it has "
                             "no classes to choose or exaggerate; leave out --classes, --guidance")
    if dit.cfg.condition != "class" or len(dit.class_names) == 1:
        how["guidance"] = 1.0                           # nothing to exaggerate
    return how


def ready_to_sample(dit, cfg, device):
    """On CUDA: weights in bfloat16 once, not at every step, and the step compiled where that works.

    Buffers and the state of the sampler stay float32.
    """
    if device.type != "cuda":
        return
    for parameter in dit.parameters():
        parameter.data = parameter.data.bfloat16()
    if cfg.compile:
        try:                                            # a compiler or headers may be missing
            torch.compile(torch.square)(torch.ones(1, device=device))
            dit.denoise = torch.compile(dit.denoise, mode="reduce-overhead")
        except Exception as error:                      # one for each part of the compiler
            reason = str(error).strip().split("\n")[0]
            print(f"torch.compile does not work here ({reason}): the same samples, but slower")


def write_half(path, model, **about):
    """A checkpoint of a model's weights as float16, with what its stage needs to load it."""
    about["step"] = model.step
    about["ema"] = model.state_dict()
    for name, value in about["ema"].items():
        if value.is_floating_point():
            about["ema"][name] = value.half()
    if not nerv_vae.save_checkpoint(path, about):
        raise SystemExit(f"could not write {path}")


# ----------------------------------------------------------------------------------------- pictures

def show_samples(cfg, out, clips):
    """The first clips as mp4, and samples.gif and .png, of --long with the trained frames alone."""
    for name in data.written(out):                      # of a run before, and nothing but ours
        if re.fullmatch(r"\d{3,}_.+\.mp4", name):
            (out / name).unlink(missing_ok=True)
    names = [clips.classes[label] for label in clips.labels]
    films = min(cfg.mp4, len(clips))
    for i in data.progress(range(films), desc="mp4", unit="file"):
        save_video(out / mp4_name(i, len(clips), names[i]), clips[i, 0][0], cfg.fps)
    shown = torch.stack([clips[i, 0][0][::cfg.long] for i in range(min(64, len(clips)))])
    save_video(out / "samples.gif", tile(shown, round(len(shown) ** 0.5), names), cfg.fps)
    save_video(out / "samples.png", strips(shown[:16], names))
    print(f"wrote {len(clips)} videos to {out}/samples.npy, the first {films} also as mp4, "
          f"{len(shown)} in samples.gif and .png")


def mp4_name(i, n, name):
    """007_Apply-Eye-Makeup.mp4; what is no letter or digit of any script becomes a dash."""
    plain = re.sub(r"\W+", "-", name).strip("-")[:40] or "video"
    digits = max(3, len(str(n - 1)))
    return f"{i:0{digits}d}_{plain}.mp4"


def show_pair(cfg, out, which):
    """PSNR of the pair on the disk, and reconstruction.gif of its first clips."""
    a = Videos.open(out / "original.npy")
    b = Videos.open(out / "reconstruction.npy")
    quality = [data.psnr(a[i, 0][0], b[i, 0][0]).mean() for i in range(len(a))]
    print(f"{len(a)} {which} clips: PSNR {np.mean(quality):.2f} dB (mean over frames, then clips)")
    k = min(8, len(a))
    videos = torch.stack([side[i, 0][0] for side in (a, b) for i in range(k)])  # (2k, T, 3, R, R)
    labels = ["original"] * k + ["reconstruction"] * k
    save_video(out / "reconstruction.gif", tile(videos, k, labels), cfg.fps)
    print(f"wrote {out}/original.npy, reconstruction.npy and reconstruction.gif")


def strips(videos, names):
    """One row a video, time from left to right. Shapes: (n, T, 3, R, R) -> (1, 3, H', W')."""
    labels = []
    T = videos.shape[1]
    for name in names[:len(videos)]:
        labels += [name] + [f"frame {t}" for t in range(1, T)]
    return tile(videos.flatten(0, 1)[:, None], T, labels)


NIGHT = "#0d1117"
CARD = "#181e27"
GREY = "#8b949e"
PALE = "#e6edf3"
WARM = "#ff9e42"                    # tokens above 0, and what is done of the way
COLD = "#42a5ff"                    # tokens below 0


def film_sheet(tokens, videos, names, done):
    """One picture of the film: a card for each video with its tokens, an arrow and one frame.

    Shapes:  tokens (n, N, d), videos (n, 3, R, R), done in 0..1 of the way -> (H', W', 3) uint8
    """
    side = 128                                          # of a picture, in pixels as all lengths
    space = 12
    width = 2 * side + 4 * space                        # of a card
    height = side + 54
    font = ImageFont.load_default(28)
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    right = space + columns * (width + space)
    sheet = Image.new("RGB", (right, 60 + rows * (height + space)), NIGHT)
    pen = ImageDraw.Draw(sheet)
    pen.text((24, 30), "noise", GREY, font, "lm")
    pen.text((right - 24, 30), "weights", PALE if done == 1 else GREY, font, "rm")
    start = 48 + pen.textlength("noise", font)
    end = right - 48 - pen.textlength("weights", font)
    here = start + (end - start) * done
    pen.line((start, 30, end, 30), CARD, 4)
    pen.line((start, 30, here, 30), WARM, 4)
    pen.ellipse((here - 7, 23, here + 7, 37), WARM)
    for i, name in enumerate(names):
        x = space + i % columns * (width + space)
        y = 60 + i // columns * (height + space)
        pen.rounded_rectangle((x, y, x + width, y + height), 10, CARD)
        x += space
        pen.text((x, y + 21), name[:19], PALE, font, "lm")
        y += 42
        weights = token_colours(tokens[i]).resize((side, side), Image.NEAREST)
        sheet.paste(weights, (x, y))
        x += side + 2 * space
        pen.polygon((x - 17, y + 56, x - 6, y + 64, x - 17, y + 72), GREY)
        frame = Image.fromarray(data.to_uint8(videos[i]))
        sheet.paste(frame.resize((side, side), Image.BICUBIC), (x, y))
    return np.array(sheet)


def token_colours(tokens):
    """(N, d) of unit variance as a picture, in few shades, as a gif takes them."""
    grey = 127 + 14 * (tokens / 0.25).round().clamp(-9, 9)                      # (N, d)
    return ImageOps.colorize(Image.fromarray(grey.byte().numpy()), COLD, WARM, CARD)


# -------------------------------------------------------------------------------------- .nerv files

MAGIC = b"NeRV\x02"                 # the last byte: version 2
LARGEST = 1 << 22                   # bytes; no token set of ours is near


def quantise(numbers, bits):
    """Each becomes the nearest of 2^bits that lie evenly between the smallest and the largest.

    Shapes:  (n,) float -> levels (n,) uint8, low, scale; levels * scale + low is off by scale / 2
    Source:  paper (NeRV-Enc A.4, Eq. 2)
             choice (not said): one range for all tokens of a video; arithmetic in float64
    """
    x = np.asarray(numbers, np.float64)
    low = float(x.min())
    scale = float(x.max() - low) / (2 ** bits - 1)
    levels = np.round((x - low) / (scale or 1))
    return levels.astype(np.uint8), low, scale


def pack_tokens(numbers, bits, **about):
    """The numbers (n,) of a video as the bytes of a .nerv file; integers are little-endian.

    magic, 5 bytes | length of the header, 4 bytes | header, JSON | payload | CRC-32 of all, 4 bytes
    payload: levels, a byte each, Huffman coded (raw deflate without matches); at 32 bits float32
    """
    numbers = numbers.float().cpu().numpy()
    header = dict(count=len(numbers), bits=bits, **about)
    if bits == 32:
        payload = numbers.astype("<f4").tobytes()
    else:
        levels, header["low"], header["scale"] = quantise(numbers, bits)
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        payload = coder.compress(levels.tobytes()) + coder.flush()
    header = json.dumps(header).encode()
    blob = MAGIC + len(header).to_bytes(4, "little") + header + payload
    return blob + zlib.crc32(blob).to_bytes(4, "little")


def unpack_tokens(blob):
    """Header and numbers (n,) float32 of a .nerv file. Raises: ValueError and its like."""
    checksum = int.from_bytes(blob[-4:], "little")
    if blob[:5] != MAGIC or zlib.crc32(blob[:-4]) != checksum:
        raise ValueError("it is none, or truncated or altered: its checksum is another")
    start = 9 + int.from_bytes(blob[5:9], "little")
    header = json.loads(blob[9:start])
    payload = blob[start:-4]
    count = header["count"]
    if type(count) is not int or not 0 < count <= LARGEST:
        raise ValueError("its header has impossible sizes")
    if header["bits"] == 32:
        numbers = np.frombuffer(payload, "<f4").astype(np.float32)
    else:
        payload = zlib.decompressobj(-15).decompress(payload, count + 1)        # never more memory
        levels = np.frombuffer(payload, np.uint8)
        numbers = levels * float(header["scale"]) + float(header["low"])
        numbers = numbers.astype(np.float32)
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError("its tokens are not numbers")
    return header, torch.from_numpy(numbers)


def read_nerv(path):
    """As `unpack_tokens`, of a file. Raises: SystemExit that says what is wrong with it."""
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > LARGEST:
            raise ValueError("no such file, or one larger than any token set")
        with np.errstate(over="ignore", invalid="ignore"):
            return unpack_tokens(Path(path).read_bytes())
    except Exception as error:                          # hostile files raise anything
        raise SystemExit(f"{path} cannot be read as a .nerv file ({error}); make it again with "
                         "--compress") from error


def play_numbers(numbers, vae):
    """The video of a .nerv file's numbers; NeRV-Enc's tokens leave some places unused.

    Shapes:  (n,) -> (T, 3, R, R)
    """
    used = vae.decoder.used                                              # (N, d)
    tokens = torch.zeros(used.shape, device=used.device)
    tokens[used] = numbers.to(used.device)
    return vae.play(tokens[None])[0]


# ----------------------------------------------------------------------------------------- how fast

def seconds(call):
    """Median time of a call, over 3 seconds of them, one at least."""
    from torch.utils.benchmark import Timer             # warns where there is no CUDA
    timer = Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=3).median


class Table:
    """The rows of --bench. Share: of the time that a large matrix product takes for as much."""

    def __init__(self, device, title):
        self.device = device
        self.gpu = device.type == "cuda"
        self.amp = torch.autocast(device.type, torch.bfloat16, enabled=self.gpu)
        peak_memory(device, reset=True)
        self.idle = peak_memory(device)
        size = 8192 if self.gpu else 2048
        x = torch.randn(size, size, device=device)
        with self.amp:
            self.product = 2 * size ** 3 / seconds(lambda: x @ x)           # operations a second
        copy = 2 * x.nbytes / seconds(x.clone)                                  # bytes a second
        name = f"{torch.get_num_threads()} CPU threads"
        if self.gpu:
            name = torch.cuda.get_device_name()
        self.rows = [f"{title}; {name}: {self.product / 1e12:.3g} TFLOP/s, "
                     f"copy {copy / 1e9:.3g} GB/s"]
        print(self.rows[0])
        print(f"{'':<38} params M     TFLOP   latency s  peak GB  share")

    def module(self, name, module, *inputs):
        """A row for one call of a module. Returns its operations, two for each multiply-add."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(*inputs)                             # fused attention would not be counted
        flop = counter.get_total_flops()
        if self.gpu:
            module.compile()
        self.row(name, module, lambda: module(*inputs), flop)
        return flop

    def training(self, name, model, loss, flop):
        """A row for one training step, whose backward pass is two forward ones."""
        opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step():
            opt.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss().backward()
            opt.step()

        self.row(name, model, step, 3 * flop)

    def row(self, name, model, call, flop, times=1):
        """Time a call that is 1 / times of the thing. Memory: what comes on top of idle."""
        peak_memory(self.device, reset=True)
        with self.amp:
            if self.gpu:
                call()                                  # compiles
            latency = times * seconds(call)
        peak = (peak_memory(self.device) - self.idle) / 1e9
        weights = sum(tensor.numel() for tensor in model.state_dict().values())
        share = flop / self.product / latency
        self.rows.append(dict(name=name, params=weights, tflop=flop / 1e12, latency_s=latency,
                              peak_gb=peak, share=share))
        print(f"{name:<38} {weights / 1e6:8.3f} {flop / 1e12:9.3f} {latency:11.4f} {peak:8.2f} "
              f"{share:6.1%}", flush=True)


def peak_memory(device, reset=False):
    """Peak bytes since the last reset: of CUDA's allocator, or of this process on Linux, else 0."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")                       # VmHWM falls
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        return 0


if __name__ == "__main__":
    main()
