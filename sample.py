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
    python sample.py --decompress out/samples/clip.nerv             # and back: clip.nerv.mp4
    python sample.py --bench --model S     # how fast this machine runs the paper's sizes

Letters: n videos, k of them at once, T frames, H = W = R pixels, N weight tokens, d channels each.
         lambda: 1 is video a, 0 is video b.
Ranges:  pixels are in [-1, 1]; samples.npy holds uint8. mp4 and gif are lossy, for eyes only.
Each mode is one function with the name of its flag: MODES lists them, main calls them.
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
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import nerv_dit
import nerv_vae
from data import Videos, save_video, tile
from generative_nerv import embed, render
from nerv_dit import denoise_steps, noise_of, sample_tokens


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
    batch: int = 0                  # 0..: videos made at once; 0: 16, 1 with --bench (paper E.1)
    seed: int = 0                   # 0..4294967295: fixes the noise of every video
    compile: bool = True            # on CUDA: the sampling step compiled and replayed as a graph
    # where
    dit: str = "out/dit/ckpt.pt"    # checkpoint of nerv_dit.py
    vae: str = ""                   # of nerv_vae.py; empty: the DiT's, or out/vae/ckpt.pt
    weights: str = ""               # NAME of exported ones instead of --dit and --vae; assets/toy
    data_root: str = ""             # folder of videos that moved, or of others that did not train
    out: str = "out/samples"        # folder that everything is written to
    fps: int = 8                    # 1..1000: frames a second of mp4 and gif
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
    frame = torch.arange(vae.cfg.frames * cfg.long) / cfg.long
    condition, classes, labels, told = asked(cfg, vae, dit, cfg.n)
    settings = dict(clip_settings(vae, cfg.long), n=cfg.n, seed=cfg.seed, asked=cfg.classes,
                    condition=condition, dit_sha256=dit.sha256, dit_step=dit.step, **dit.how)
    store = Videos.create(out / "samples.npy", settings, classes)
    k = cfg.batch or 16
    for first in data.progress(range(len(store), cfg.n, k), desc="generating"):
        cond = told[first:first + k]                                            # (k,) or (k, N, d)
        tokens = sample_tokens(dit, **start(cfg, dit, cond, first))             # (k, N, d)
        store.add(vae.play(tokens, frame), labels[first:first + k], tokens)
    show_samples(cfg, out, store.close())


def interp(cfg, out, vae, dit):
    """lambda * a + (1 - lambda) * b on the tokens of two videos.

    interp.gif and interp.png show 9 lambdas, interp_sheet.png holds 25 for the sliders of the page,
    which knows this number.
    Source:  paper (Sec. 4.5.2): kernels go straight, then are normalised
    """
    a, b = two_ends(cfg, out, vae)                                              # (N, d) each
    lam = torch.linspace(1, 0, 25)[:, None, None]                               # (25, 1, 1)
    videos = vae.play(lam * a + (1 - lam) * b)                                  # (25, T, 3, R, R)
    sheet = videos.permute(2, 1, 3, 0, 4).flatten(3).flatten(1, 2)              # (3, T R, 25 R)
    save_video(out / "interp_sheet.png", sheet[None])
    names = [f"lambda {value:.3g}" for value in lam[::3].flatten()]
    show(cfg, out, "interp", videos[::3], 9, names)


def time_interp(cfg, out, vae, dit):
    """The first video's weights asked for frames between the trained ones (Sec. 4.5.1)."""
    show_frames(cfg, out, vae, "time_interp", vae.cfg.frames, cfg.time_interp)


def extrapolate(cfg, out, vae, dit):
    """The first video's weights asked for as many frames again, which never trained (Sec. 4.5.1)."""
    show_frames(cfg, out, vae, "extrapolate", 2 * vae.cfg.frames, 1)


def predict(cfg, out, vae, dit):
    """From a real video what the DiT learned to make: its future, its motion, or its colours."""
    kind = dit.cfg.condition
    if not dit.by_tokens:
        raise SystemExit(f"{dit.path} was trained with --condition {kind}; --predict needs a DiT "
                         "trained with --condition frames, image or edge")
    clip = file_tokens(cfg.predict, vae)[1]                                     # (T, 3, R, R)
    shown = data.condition_video(clip, kind)                                    # (T, 3, R, R)
    told = encode(shown, vae).expand(cfg.n, -1, -1)                             # (n, N, d)
    tokens = sample_tokens(dit, **start(cfg, dit, told))                        # (n, N, d)
    videos = torch.cat([clip[None], shown[None], vae.play(tokens)])             # (2+n, T, 3, R, R)
    names = ["the video", f"shown: {kind}"] + [f"answer {i}" for i in range(cfg.n)]
    show(cfg, out, "predict", videos, 6, names)


def reconstruct(cfg, out, vae, dit):
    """Clips that did not train and what comes back: original.npy and reconstruction.npy, a pair."""
    clips, which = unseen_clips(cfg, vae)
    chosen = np.random.default_rng(cfg.seed).permutation(len(clips))[:cfg.n].tolist()
    settings = dict(clip_settings(vae), which=which, seed=cfg.seed,
                    pair=f"{vae.sha256[:12]}-{cfg.seed}-{len(chosen)}")
    a = Videos.create(out / "original.npy", settings, clips.classes)
    for i in data.progress(range(len(a), len(chosen)), desc="reading"):
        video, label = clips[chosen[i], i]                                      # (T, 3, R, R)
        a.add(video[None], [label])
    a = a.close()                                       # the encoder sees what will be measured
    b = Videos.create(out / "reconstruction.npy", settings, clips.classes)
    for i in data.progress(range(len(b), len(a)), desc="reconstructing"):
        video, label = a[i, 0]
        given = data.degrade(video, vae.cfg.degrade)                            # (T, 3, R, R)
        b.add(vae.play(encode(given, vae)), [label])
    b = b.close()
    quality = [data.psnr(a[i, 0][0], b[i, 0][0]).mean() for i in range(len(a))]
    print(f"{len(a)} {which} clips: PSNR {np.mean(quality):.2f} dB (mean over frames, then clips)")
    k = min(8, len(a))
    videos = data.from_uint8(np.concatenate([a.pixels[:k], b.pixels[:k]]))      # (2k, T, 3, R, R)
    show(cfg, out, "reconstruction", videos, k, ["original"] * k + ["reconstruction"] * k)


def compress(cfg, out, vae, dit):
    """A video's first clip as a .nerv file; prints what each number of bits costs and keeps."""
    tokens, clip = file_tokens(cfg.compress, vae)                               # (N, d), (T, 3, R, R)
    path = out / (Path(cfg.compress).stem + ".nerv")
    pixels = clip[:, 0].numel()
    videos = [clip]
    names = ["the video"]
    print(" bits    bytes   bits/pixel   PSNR dB")
    for bits in (4, 5, 6, 7, 8, 32):
        blob = pack_tokens(tokens[vae.decoder.used], bits, vae_sha256=vae.sha256)
        video = play_numbers(unpack_tokens(blob)[1], vae)                       # (T, 3, R, R)
        quality = data.psnr(video, clip).mean()
        print(f"{bits:5d} {len(blob):8d} {8 * len(blob) / pixels:12.4f} {quality:9.2f}")
        videos.append(video)
        names.append(f"{bits} bits, {len(blob)} bytes")
        if bits == cfg.bits:
            data.write_file(path, blob)
    print(f"wrote {path} at {cfg.bits} bits")
    show(cfg, out, "compress", torch.stack(videos), 7, names)


def decompress(cfg, out, vae, dit):
    """Play a .nerv file through the tokenizer that made it, into an mp4."""
    header, numbers = read_nerv(cfg.decompress)
    made_by = header.get("vae_sha256")
    if made_by != vae.sha256 or len(numbers) != vae.decoder.used.sum():
        raise SystemExit(f"{cfg.decompress} was made by another tokenizer than {vae.path}; give "
                         f"the one whose sha256 is {made_by!r} with --vae")
    path = out / f"{Path(cfg.decompress).name}.mp4"     # clip.nerv.mp4: clip.mp4 is the original's
    save_video(path, play_numbers(numbers, vae), cfg.fps)
    print(f"wrote {path}")


def film(cfg, out, vae, dit):
    """The sampler at work, film.gif: tokens turn from noise to weights, beside what they decode to.

    Up to 6 videos. Four seconds of walk, two of what it came to; the clips run to and fro.
    """
    n = min(cfg.n, 6)
    _, classes, labels, told = asked(cfg, vae, dit, n)
    names = [classes[label] for label in labels]
    walk = list(denoise_steps(dit, **start(cfg, dit, told)))
    turn = max(vae.cfg.frames - 1, 1)
    sheets = []
    for i in range(75):
        done = min(i / 49, 1)
        tokens = walk[round(done * (len(walk) - 1))]                            # (n, N, d)
        time = abs(i * cfg.fps / 12.5 % (2 * turn) - turn)                      # T-1 .. 0 .. T-1 ..
        videos = vae.play(tokens, torch.tensor([time]))[:, 0]                   # (n, 3, R, R)
        sheets.append(film_sheet(dit.normalise(tokens).cpu(), videos, names, done))
    save_video(out / "film.gif", data.from_uint8(np.stack(sheets)), 12.5)
    print(f"wrote {out}/film.gif: {len(walk)} steps from noise to weights, and to video")


def export(cfg, out, vae, dit):
    """The averaged weights of both stages in half precision, without optimizers: to hand on."""
    vae_path = Path(f"{cfg.export}-vae.pt")
    dit_path = Path(f"{cfg.export}-dit.pt")
    write_half(vae_path, vae, made_by=nerv_vae.MADE_BY)
    dit.cfg = replace(dit.cfg, vae=str(vae_path))
    write_half(dit_path, dit, made_by=nerv_dit.MADE_BY,
               tokens=list(dit.token_mean.shape), vae_sha256=data.file_hash(vae_path))
    print(f"wrote {vae_path} and {dit_path}; use them with --weights {cfg.export}")


def bench(cfg, out, vae, dit):
    """Time the paper's sizes with random weights on this machine, into bench.json.

    Share: of the time that a large matrix product takes for as many operations.
    Source:  paper (Tables A2, A3, E.16), and one training step of each stage
             departs (E.1 averages 100 calls): the median of what fits into 3 seconds; no LPIPS, no
             GAN, no weights of the loss; bfloat16, torch.compile, memory and all 250 steps on CUDA
             only
    """
    device = nerv_vae.pick_device()
    gpu = device.type == "cuda"
    preset = "ucf256" if cfg.resolution == 256 else "ucf"
    c = replace(nerv_vae.Config(**nerv_vae.PRESETS[preset]), model=cfg.model)
    B = cfg.batch or 1
    R = c.resolution
    product, machine = measure_machine(device)
    with device:
        video = torch.zeros(B, c.frames, 3, R, R)
        z = torch.randn(B, c.tokens, c.token_dim)
        frame = torch.arange(float(c.frames))
        t = torch.zeros(B, dtype=torch.long)            # which time or class does not matter
        vae = nerv_vae.NeRVVAE(c).eval()
    rows = [f"{c.model}, {R} x {R}, batch {B}; {machine}"]
    print(rows[0])
    print(f"{'':<40}    TFLOP   latency s  peak GB  share")

    def row(name, call, flop=0):
        """Time a call. Returns its operations, two for each multiply-add, counted if not given."""
        if not flop:                                    # fused attention would not be counted
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                call()
            flop = counter.get_total_flops()
            call = torch.compile(call, disable=not gpu)
        with torch.autocast(device.type, torch.bfloat16, gpu):
            if gpu:
                call()                                  # compiles
                torch.cuda.reset_peak_memory_stats()
            latency = seconds(call)
        tflop = flop / 1e12
        peak = torch.cuda.max_memory_allocated() / 1e9                          # 0 without CUDA
        share = flop / product / latency
        rows.append(dict(name=name, tflop=tflop, latency_s=latency, peak_gb=peak, share=share))
        print(f"{name:<40} {tflop:8.3f} {latency:11.4f} {peak:8.2f} {share:6.1%}", flush=True)
        return flop

    def stage1():
        recon, mean, logvar = vae(video, frame, z)
        return (recon - video).square().mean() + nerv_vae.kl_divergence(mean, logvar).mean()

    def stage2():
        return (dit(z, t, t) - z).square().mean()

    net = vae.decoder.instantiate(z[0])
    cell = R // c.pe_size                               # convolutions do not mind the grid's size
    wide = embed(frame[:1], net.layers[0]._replace(grid=1280 // cell))          # (1, 48, 80, 80)
    wide = wide[:, :, :720 // cell]                                             # (1, 48, 45, 80)
    encoding = row("encode", lambda: vae.encoder(video))
    decoding = row("decode", lambda: vae.decode(z, frame))
    row("decode one clip, instantiated", lambda: net(frame))
    row("one frame of 1280 x 720, instantiated",
        lambda: render(net.layers, net.convs, wide, c.side))
    step = training_step(vae, stage1, gpu)
    row("training step, stage 1", step, 3 * (encoding + decoding))  # a backward pass takes two forward
    dit = nerv_dit.DiT(nerv_dit.Config(**nerv_dit.PRESETS[preset]), c.tokens, c.token_dim, 101)
    dit.to(device)
    denoising = row("one pass of DiT", lambda: dit(z, t, t))
    row("training step, stage 2", training_step(dit, stage2, gpu), 3 * denoising)
    ready_to_sample(dit, cfg, device)
    steps = 250 if gpu else 2
    row(f"{steps} DDPM steps, guidance 2",
        lambda: sample_tokens(dit, t, z, "ddpm", steps, 2.0), 2 * steps * denoising)
    data.write_file(out / "bench.json", json.dumps(rows, indent=1).encode())


MODES = [bench, compress, decompress, reconstruct, film, predict, interp, time_interp, extrapolate,
         export]
WITHOUT_DIT = {compress, decompress, reconstruct}
OF_SAMPLES = {interp, time_interp, extrapolate}                 # those of the same command


@torch.no_grad()
def main(argv=None):
    """Command line of sample.py. Returns the folder written to."""
    data.alone("sample.py")
    cfg = data.parse_config(Config, {}, argv)
    modes = [mode for mode in MODES if getattr(cfg, mode.__name__)]
    if not modes or OF_SAMPLES.intersection(modes):
        modes.insert(0, generate)
    if cfg.bench:
        modes = [bench]                                 # alone, or it would time the rest
    out = Path(cfg.out)
    with data.claim(out):
        vae, dit = load(cfg, modes)
        try:
            for mode in modes:
                mode(cfg, out, vae, dit)
        except KeyboardInterrupt:
            raise SystemExit("stopped; the same command goes on with clips on disk") from None
        data.write_page(out, "sample.py", asdict(cfg))
    return out


# -------------------------------------------------------------------------- The method ends here
# Below: what is asked for, checkpoints, pictures, .nerv files, the clock of --bench.

def asked(cfg, vae, dit, n):
    """What each of n videos is made from: its class, nothing, or a clip that did not train.

    Returns the condition in words; classes, and the label of each video (n,); what DiT is told
    Shapes:  told (n,) labels, or tokens (n, N, d)
    """
    condition = dit.cfg.condition
    if dit.by_tokens:
        clips, which = unseen_clips(cfg, vae)
        order = np.random.default_rng(cfg.seed).permutation(len(clips))
        order = np.resize(order, n).tolist()            # in turn
        told = []
        for seed, i in enumerate(data.progress(order, desc="encoding")):
            shown = data.condition_video(clips[i, seed][0], condition)          # (T, 3, R, R)
            told.append(encode(shown, vae))                                     # (1, N, d)
        condition += f" of {which} clips"
        return condition, clips.classes, clips.labels[order], torch.cat(told)
    classes = dit.class_names if condition == "class" else ["video"]
    labels = pick_labels(cfg.classes, classes, n)
    told = torch.tensor(labels, device=dit.token_mean.device)
    return condition, classes, labels, told


def pick_labels(wanted, names, n):
    """n class numbers from "ring sliding,3", in turn; a name may hold commas, the longest one wins.

    Raises:  SystemExit that lists the classes
    """
    known = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    wanted = unicodedata.normalize("NFC", wanted)       # as the names are
    words = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
    entry = rf"\s*({words})\s*(?:,|$)"
    left = re.sub(entry, "", wanted).strip(" ,")
    if left:
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        raise SystemExit(f"no class {left!r}; the classes are {listed}")
    chosen = [known[word] for word in re.findall(entry, wanted)]
    return np.resize(chosen or range(len(names)), n)


def start(cfg, dit, cond, first=0):
    """Where and how the sampler starts for as many videos as `cond` is for, from number `first` on.

    The noise of a video follows from its number, whatever batch it is in.
    Returns settings of `sample_tokens`. Shapes: cond (k,) or (k, N, d), noise (k, N, d)
    """
    seed = cfg.seed * 1_000_003 + first
    noise = noise_of(seed, len(cond), dit.token_mean.shape)
    return dict(cond=cond, noise=noise.to(cond.device), seed=seed, **dit.how)


def encode(clip, vae):
    """Mean tokens of a clip. Shapes: (T, 3, R, R) -> (1, N, d)."""
    return vae.encode(clip[None])[0]


def file_tokens(path, vae):
    """Mean tokens of the first clip of a video file. Shapes: -> (N, d), clip (T, 3, R, R)."""
    c = vae.cfg
    with data.told(f"{path} has no readable clip of {c.frames} frames at stride {c.stride}"):
        # At stride 0 the clip spreads over the whole video.
        stride = c.stride or (data.survey(path)["frames"] - 1) // max(c.frames - 1, 1)
        clip = data.read_clip(path, 0, c.frames, stride, c.resolution)
    return encode(clip, vae)[0], clip


def two_ends(cfg, out, vae):
    """Tokens of --video-a, else the first sample, and --video-b, else the last. -> (2, N, d)."""
    tokens = Videos.open(out / "samples.npy").tokens
    ends = torch.tensor(tokens[[0, -1]])
    for i, path in enumerate((cfg.video_a, cfg.video_b)):
        if path:
            ends[i] = file_tokens(path, vae)[0]
    return ends


def unseen_clips(cfg, vae):
    """Clips that did not train, never mirrored, and what to call them.

    Held-out ones of stage 1's folder; all of it where all trained; all of another --data-root.
    A folder that only moved is told by its files: stage 1's index knows their names and sizes.
    """
    about = replace(vae.cfg, flip=False, out=cfg.out,
                    data_root=cfg.data_root or vae.cfg.data_root)
    known = data.read_checked(vae.path.with_name("index.json"))
    if known:
        root, names, _ = data.find_videos(about)
        here = {(name, os.path.getsize(root / name)) for name in names}
        if here.isdisjoint((name, file.get("size")) for name, file in known.items()):
            return data.build_dataset(replace(about, split="all")), "unseen"
        about = replace(about, out=str(vae.path.parent))        # no need to look through them again
    clips = data.build_dataset(about, held_out=True)
    if len(clips):
        return clips, "held-out"
    return data.build_dataset(about), "training"


def clip_settings(vae, long=1):
    """What a measurement must know about clips with `long` frames for every trained one."""
    c = vae.cfg
    return dict(dataset=c.dataset, frames=c.frames * long, stride=c.stride / long, split=c.split,
                resolution=c.resolution, vae_sha256=vae.sha256, vae_step=vae.step)


# ------------------------------------------------------------------------------------------ loading

def load(cfg, modes):
    """The checkpoints that the modes need, checked against each other and against the flags.

    dit.how: sampler, steps and guidance are the flags', else those that the DiT was configured with.
    """
    if cfg.bench:
        return None, None
    if cfg.weights:
        cfg = replace(cfg, dit=f"{cfg.weights}-dit.pt", vae=f"{cfg.weights}-vae.pt")
    device = nerv_vae.pick_device()
    if WITHOUT_DIT.issuperset(modes):
        return nerv_vae.load_vae(cfg.vae or "out/vae/ckpt.pt", device), None
    dit = nerv_dit.load_dit(cfg.dit, device)
    if not dit.by_class and (cfg.classes or cfg.guidance not in (0, 1)):
        raise SystemExit(f"{cfg.dit} has no classes to choose from or exaggerate; leave out "
                         "--classes and --guidance")
    sampler = dit.cfg.sampler if cfg.sampler == "auto" else cfg.sampler
    dit.how = dict(sampler=sampler, steps=cfg.sample_steps or dit.cfg.sample_steps,
                   guidance=cfg.guidance or dit.cfg.guidance)
    vae = nerv_vae.load_vae(cfg.vae or dit.cfg.vae, device)
    if vae.sha256 != dit.vae_sha256:
        raise SystemExit(f"{cfg.dit} was trained on another tokenizer than {vae.path}; say with "
                         f"--vae where the one is whose sha256 is {dit.vae_sha256}")
    if not cfg.export:
        ready_to_sample(dit, cfg, device)
    return vae, dit


def ready_to_sample(dit, cfg, device):
    """On CUDA: weights in bfloat16 once, not at every step, and the step compiled where that works.

    Buffers and the state of the sampler stay float32.
    """
    if device.type == "cuda":
        for parameter in dit.parameters():
            parameter.data = parameter.data.bfloat16()
        if cfg.compile and nerv_vae.can_compile(device):
            dit.denoise = torch.compile(dit.denoise, mode="reduce-overhead")


def write_half(path, model, **about):
    """A checkpoint of a model's weights as float16, with what its stage needs to load it."""
    about.update(config=asdict(model.cfg), classes=model.class_names, step=model.step,
                 ema=model.half().state_dict())
    nerv_vae.save_checkpoint(path, about)


# ----------------------------------------------------------------------------------------- pictures

def show_samples(cfg, out, clips):
    """The first clips as mp4, and samples.gif and .png, of --long with the trained frames alone."""
    for name in data.written(out):                      # of a run before, and nothing but ours
        if re.fullmatch(r"\d{3,}_.+\.mp4", name):
            (out / name).unlink(missing_ok=True)
    names = [clips.classes[label] for label in clips.labels]
    films = min(cfg.mp4, len(clips))
    for i in data.progress(range(films), desc="mp4"):
        save_video(out / mp4_name(i, names[i]), clips[i, 0][0], cfg.fps)
    print(f"wrote {len(clips)} videos to {out}/samples.npy, the first {films} also as mp4")
    shown = data.from_uint8(clips.pixels[:64, ::cfg.long].copy())               # (k, T, 3, R, R)
    show(cfg, out, "samples", shown, round(len(shown) ** 0.5), names)


def mp4_name(i, name):
    """007_Apply-Eye-Makeup.mp4; what is no letter or digit of any script becomes a dash."""
    plain = re.sub(r"\W+", "-", name).strip("-")[:40] or "video"
    return f"{i:03d}_{plain}.mp4"


def show(cfg, out, stem, videos, columns, names):
    """STEM.gif plays all videos, STEM.png has the frames of the first 16, a row for each.

    Shapes:  videos (n, T, 3, R, R), names n or more
    """
    save_video(out / f"{stem}.gif", tile(videos, columns, names), cfg.fps)
    T = videos.shape[1]
    frames = videos[:16].flatten(0, 1)                                          # (16 T, 3, R, R)
    labels = []
    for name in names:
        labels += [name] + [f"frame {t}" for t in range(1, T)]
    save_video(out / f"{stem}.png", tile(frames[:, None], T, labels))
    print(f"wrote {out}/{stem}.gif and .png")


def show_frames(cfg, out, vae, stem, last, k):
    """STEM.gif plays what the first video's weights give at times 0, 1/k .. last - 1/k.

    STEM.png has four rows of as many frames as trained.
    """
    frame = torch.arange(last * k) / k
    video = vae.play(two_ends(cfg, out, vae)[:1], frame)[0]                     # (n, 3, R, R)
    save_video(out / f"{stem}.gif", video, cfg.fps * k)
    T = vae.cfg.frames
    labels = [f"t = {t:.3g}" for t in frame]
    save_video(out / f"{stem}.png", tile(video[:4 * T, None], T, labels))
    print(f"wrote {out}/{stem}.gif and .png")


NIGHT = "#0d1117"
CARD = "#181e27"
GREY = "#8b949e"
WARM = "#ff9e42"                    # tokens above 0, and what is done of the way
COLD = "#42a5ff"                    # tokens below 0


def film_sheet(tokens, videos, names, done):
    """One picture of the film: a card for each video with its tokens and one frame.

    Shapes:  tokens (n, N, d), videos (n, 3, R, R), done in 0..1 of the way -> (H', W', 3) uint8
    """
    font = ImageFont.load_default(28)
    rows = -(-len(names) // 3)
    sheet = Image.new("RGB", (960, 60 + 194 * rows), NIGHT)
    pen = ImageDraw.Draw(sheet)
    pen.text((24, 30), "noise", GREY, font, "lm")
    pen.text((936, 30), "weights", GREY, font, "rm")
    pen.line((116, 30, 116 + 696 * done, 30), WARM, 6)
    for i, name in enumerate(names):
        x = 12 + i % 3 * 316                            # a card of 304 and a gap of 12, in pixels
        y = 60 + i // 3 * 194
        pen.rounded_rectangle((x, y, x + 304, y + 182), 10, CARD)
        pen.text((x + 12, y + 21), name[:19], "white", font, "lm")
        frame = Image.fromarray(data.to_uint8(videos[i]))
        sheet.paste(token_colours(tokens[i]).resize((128, 128), Image.NEAREST), (x + 12, y + 42))
        sheet.paste(frame.resize((128, 128)), (x + 164, y + 42))
    return np.array(sheet)


def token_colours(tokens):
    """(N, d) of unit variance as a picture, in few shades, as a gif takes them."""
    grey = 127 + 14 * (tokens / 0.25).round().clamp(-9, 9)                      # (N, d)
    return ImageOps.colorize(Image.fromarray(grey.byte().numpy()), COLD, WARM, CARD)


# -------------------------------------------------------------------------------------- .nerv files

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
    """The numbers (n,) of a video as a .nerv file: a gzip file, of Huffman codes alone.

    In it: a line of JSON, then the level of each number, a byte; at 32 bits float32, little-endian
    """
    numbers = numbers.cpu().numpy()
    header = dict(about, bits=bits)
    if bits == 32:
        levels = numbers.astype("<f4")
    else:
        levels, header["low"], header["scale"] = quantise(numbers, bits)
    content = json.dumps(header).encode() + b"\n" + levels.tobytes()
    coder = zlib.compressobj(wbits=31, strategy=zlib.Z_HUFFMAN_ONLY)            # 31: as gzip
    return coder.compress(content) + coder.flush()


def unpack_tokens(blob):
    """Header and numbers (n,) float32 of a .nerv file. Raises: ValueError and its like."""
    coder = zlib.decompressobj(31)
    content = coder.decompress(blob, LARGEST)           # never more memory
    if not coder.eof:                                   # it is where gzip's checksum is right
        raise ValueError("it is truncated, or larger than any token set")
    header, payload = content.split(b"\n", 1)
    header = json.loads(header)
    if header["bits"] == 32:
        numbers = torch.tensor(np.frombuffer(payload, "<f4"))
    else:
        levels = torch.tensor(np.frombuffer(payload, np.uint8))
        numbers = (levels.double() * header["scale"] + header["low"]).float()
    if not numbers.isfinite().all():
        raise ValueError("its tokens are not numbers")
    return header, numbers


def read_nerv(path):
    """As `unpack_tokens`, of a file. Raises: SystemExit that says what is wrong with it."""
    with data.told(f"{path} cannot be read as a .nerv file; make it again with --compress"):
        with open(path, "rb") as file:
            return unpack_tokens(file.read(LARGEST))


def play_numbers(numbers, vae):
    """The video of a .nerv file's numbers; NeRV-Enc's tokens leave some places unused.

    Shapes:  (n,) -> (T, 3, R, R)
    """
    used = vae.decoder.used.cpu()                                               # (N, d)
    tokens = torch.zeros(used.shape)
    tokens[used] = numbers
    return vae.play(tokens[None])[0]


# ----------------------------------------------------------------------------------------- how fast

def seconds(call):
    """Median time of a call, over 3 seconds of them, one at least."""
    from torch.utils.benchmark import Timer             # warns where there is no CUDA
    timer = Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=3).median


def measure_machine(device):
    """A large matrix product, in operations a second, and a line on it and on copying memory."""
    x = torch.randn(4096, 4096, device=device)
    name = f"{torch.get_num_threads()} CPU threads"
    if x.is_cuda:
        x = x.bfloat16()
        name = torch.cuda.get_device_name()
    product = 2 * len(x) ** 3 / seconds(lambda: x @ x)
    copy = 2 * x.nbytes / seconds(x.clone)                                      # bytes a second
    return product, f"{name}: {product / 1e12:.3g} TFLOP/s, copy {copy / 1e9:.3g} GB/s"


def training_step(model, loss, gpu):
    """One training step as a function, the loss compiled on CUDA."""
    opt = nerv_vae.adamw(model.train().parameters())
    loss = torch.compile(loss, disable=not gpu)

    def step():
        opt.zero_grad()
        with torch.enable_grad():
            loss().backward()
        opt.step()

    return step


if __name__ == "__main__":
    main()
