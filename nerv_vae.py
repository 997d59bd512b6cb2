"""Stage 1: a VAE whose latent code is the weights of a small video network.

    video (B, T, 3, H, W) -> patches (B, P, patch values) -> ViT over [patches ; N queries] -> keep the N queries
      -> BatchNorm -> FC -> mean, logvar (B, N, d) -> z = mean + sigma * eps = the weight tokens
      -> GenerativeNeRV(z, frame) -> video (B, T, 3, H, W)

    python nerv_vae.py                                              # toy clips, laptop CPU, a few minutes
    python nerv_vae.py --dataset ucf --data-root UCF-101            # the paper's run (NeRV-Diffusion-S; --model B, L)
    python nerv_vae.py --dataset folder --data-root my_videos       # any tree of videos

It writes out/vae/: ckpt.pt (all that stage 2 and sample.py need), log.jsonl (one line a log step), step_XXXXXX.gif
(held-out originals over reconstructions over their difference). The same command again continues where it stopped.

Letters: B videos, T frames, H = W pixels, P patches, N weight tokens, d channels a token.
Ranges:  pixels are in [-1, 1]; tokens are pulled towards N(0, 1) by the KL term; `frame` is 0..T-1.
"""
import dataclasses
import json
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import build_dataset, parse_config, save_video, tile
from generative_nerv import GenerativeNeRV, sinusoids


@dataclass(frozen=True)
class Config:
    """Settings of stage 1; the defaults are the toy preset. Paper: A.1, A.2, Table A1; the rest is choice."""

    # data
    dataset: str = "toy"            # toy|ucf|ucf256|k600|folder|laptop: the clips, and the row of presets to start from
    data_root: str = ""             # folder of videos, one sub-folder a class (not needed for toy)
    split: str = "all"              # all, train, test or a list of groups such as 1-19,23: the videos that train
    frames: int = 8                 # T, frames per clip (paper: 16)
    stride: int = 1                 # step in the file between frames of a clip; 0 spreads them over the whole file
    resolution: int = 32            # H = W in pixels (paper: 128 and 256)
    flip: bool = False              # mirror half of the clips (choice: on for real footage, as LARP)
    workers: int = 0                # loader processes; 0 reads in the training process
    # weight tokens and decoder
    model: str = "16"               # decoder width D: S, B, L (128, 256, 512; paper A.2) or a number of channels
    tokens: int = 32                # N, weight tokens a video (paper: 128, and 160 at 256 x 256)
    token_dim: int = 32             # d, channels a weight token (paper: 128)
    gen_channels: int = 8           # generated block of a D -> D kernel: this many inputs and outputs (paper: 64)
    pe_size: int = 8                # height and width of the positional input (paper Table 2c: 8 is best)
    pe_dim: int = 16                # sinusoids for each of time, height and width (paper A.2)
    pe_base: float = 30.0           # slowest sinusoid turns once in 2 pi times this many frames (choice: transformer's)
    parameterization: str = "channel"   # channel|fmm|repeat: how tokens enter a kernel (paper Table 2a)
    reuse: str = "heads"            # heads|direct|none: how layers share the tokens (paper Table 2b)
    upsample: str = "transposed"    # transposed|pixelshuffle|bilinear: what doubles the size (paper Table 2d)
    side: str = "residual"          # residual|skip|none: side connections (paper Table 2e)
    kernel_init: float = 0.1        # std of kernels at the start; smaller ones turn faster under Adam (choice)
    # encoder
    enc_depth: int = 2              # transformer blocks (paper: 18)
    enc_heads: int = 4              # attention heads (paper: 14)
    enc_dim: int = 128              # width of the transformer (paper: 896)
    patch: int = 8                  # patch height and width in pixels (paper: 8)
    patch_frames: int = 2           # patch depth in frames (paper: 1)
    logvar_start: float = -5.0      # log-variance of the posterior at the start: narrow, so tokens carry signal
    # losses (paper Eq. 1)
    kl_weight: float = 1e-6         # times the KL in nats summed over tokens and channels (paper A.1; sum: Table A12)
    lpips_weight: float = 0.0       # perceptual loss (paper: 1); 0 downloads nothing
    lpips_net: str = "vgg"          # vgg|alex|squeeze: network of the perceptual loss (choice: vgg as LARP)
    gan_weight: float = 0.0         # adversarial loss (paper A.1: 1)
    gan_start: int = 0              # first step of the discriminator and its loss (choice: 5% of the steps)
    gan_every: int = 5              # the discriminator learns every so many steps (paper A.1)
    gan_lr_ratio: float = 0.2       # its learning rate over the autoencoder's (paper A.1: one fifth)
    r1_weight: float = 0.0          # R1 gradient penalty on every 16th discriminator step (choice: off)
    # optimisation
    batch: int = 8                  # B, clips per step (paper E.17: 32)
    steps: int = 5000               # optimizer steps (paper A.1: 2M)
    lr: float = 2e-3                # AdamW's peak learning rate (paper A.1: 1e-4)
    warmup: int = 100               # steps of linear warmup before the cosine decay (paper A.1, length: choice)
    clip: float = 1.0               # largest gradient norm (choice)
    ema: float = 0.999              # decay of the averaged weights that everything after training uses (choice)
    frames_per_step: int = 2        # frames decoded of each clip in a step, 0 for all: a frame needs no other to decode
    # run
    bf16: bool = False              # bfloat16 autocast on CUDA
    compile: bool = False           # torch.compile on CUDA: a slow first step, then faster ones
    checkpointing: bool = False     # recompute encoder activations in the backward pass: less memory (256 x 256)
    overfit: bool = False           # train on one clip only, and show how close it gets
    log_every: int = 50             # steps between lines of log.jsonl; the only time the GPU is waited for
    eval_every: int = 1000          # steps between held-out PSNR, pictures and checkpoints
    out: str = "out/vae"            # folder of the run
    seed: int = 0                   # fixes initial weights, clips and noise
    resume: bool = True             # continue from out/ckpt.pt; --no-resume starts over, the old one is ckpt.old.pt


PAPER = dict(frames=16, resolution=128, flip=True, workers=8, model="S", tokens=128, token_dim=128, gen_channels=64,
             pe_base=10000.0, kernel_init=1.0, enc_depth=18, enc_heads=14, enc_dim=896, patch_frames=1,
             kl_weight=1e-5, lpips_weight=1.0, gan_weight=1.0, gan_start=100_000, batch=32, steps=2_000_000,
             lr=1e-4, warmup=10_000, ema=0.9999, frames_per_step=0, bf16=True, compile=True, log_every=100, eval_every=10_000)
LAPTOP = dict(stride=2, flip=True, model="32", gen_channels=16, tokens=64, token_dim=64, enc_depth=4, enc_dim=192,
              batch=16, steps=3000, eval_every=1000)              # a folder of real videos at 32 x 32 x 8, on a CPU
PRESETS = {"toy": {}, "ucf": PAPER, "ucf256": {**PAPER, "resolution": 256, "tokens": 160, "checkpointing": True},
           "k600": PAPER, "folder": PAPER, "laptop": LAPTOP}


# ---------------------------------------------------------------------------------------------- model

class Attention(nn.Module):
    """Multi-head self-attention. Shapes: (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, L, dim = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)   # (B, heads, L, c)
        y = F.scaled_dot_product_attention(q, k, v)                                 # (B, heads, L, c)
        return self.proj(y.transpose(1, 2).reshape(B, L, dim))                      # (B, L, dim)


def mlp(dim):
    """The transformer's two-layer perceptron, four times as wide inside. Shapes: (..., dim) -> (..., dim)."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class Block(nn.Module):
    """Pre-norm transformer block of ViT. Shapes: (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), mlp(dim)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class NeRVEncoder(nn.Module):
    """The hypernetwork: reads a video as patches and writes the weights of its decoder into N query tokens.

    Shapes:  video (B, T, 3, H, W) -> mean, logvar (B, N, d) each
    Units:   pixels in [-1, 1]; the posterior of a token channel is N(mean, exp(logvar))
    Raises:  SystemExit when patches do not fill the clip
    Source:  paper Sec. 3.1 (queries, BatchNorm, FC bottleneck), A.1 (18 blocks, 14 heads, 896). Choice: fixed sin-cos
             positions as large as the patch embedding, so that the first step already knows where a patch lies
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, dim, p = cfg, cfg.enc_dim, cfg.patch
        grid = (cfg.frames // cfg.patch_frames, cfg.resolution // p, cfg.resolution // p)
        if (grid[0] * cfg.patch_frames, grid[1] * p) != (cfg.frames, cfg.resolution):
            raise SystemExit(f"patches of {cfg.patch_frames} x {p} x {p} do not fill {cfg.frames} frames of "
                             f"{cfg.resolution}; change --patch or --patch-frames")
        self.embed = nn.Linear(3 * cfg.patch_frames * p * p, dim)
        each = dim // 6 * 2                                                         # channels for each of t, y, x
        t, y, x = torch.meshgrid(*[torch.arange(n) for n in grid], indexing="ij")   # (t, h, w) each
        # Base 10 and amplitude 2: at a transformer's usual 10000 and 1 neighbours look alike and learning starts late.
        place = 2 * torch.cat([sinusoids(axis.flatten(), each, base=10.0) for axis in (t, y, x)], 1)    # (P, 3*each)
        self.register_buffer("place", F.pad(place, (0, dim - 3 * each)), persistent=False)          # (P, dim)
        # Small, or BatchNorm would see the queries' differences and scale those between videos down to nothing.
        self.queries = nn.Parameter(0.02 * torch.randn(cfg.tokens, dim))
        self.blocks = nn.ModuleList(Block(dim, cfg.enc_heads) for _ in range(cfg.enc_depth))
        self.norm = nn.BatchNorm1d(dim)
        self.bottleneck = nn.Linear(dim, 2 * cfg.token_dim)
        nn.init.zeros_(self.bottleneck.weight[cfg.token_dim:])
        nn.init.constant_(self.bottleneck.bias[cfg.token_dim:], cfg.logvar_start)

    def forward(self, video):
        B, T, _, H, W = video.shape
        p, f = self.cfg.patch, self.cfg.patch_frames
        x = video.view(B, T // f, f, 3, H // p, p, W // p, p)
        x = x.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(1, 3)              # (B, P, f*3*p*p)
        x = self.embed(x) + self.place                                              # (B, P, dim)
        x = torch.cat([x, self.queries.expand(B, -1, -1)], 1)                       # (B, P+N, dim)
        for block in self.blocks:
            if self.cfg.checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        x = x[:, -self.cfg.tokens:].float()                                         # (B, N, dim): the queries only
        x = self.norm(x.flatten(0, 1)).view_as(x)                                   # statistics over B*N tokens
        mean, logvar = self.bottleneck(x).float().chunk(2, -1)                      # (B, N, d) each
        return mean, logvar.clamp(-30, 20)


class NeRVVAE(nn.Module):
    """Both halves. Shapes: video (B, T, 3, H, W), frame (k,) -> recon (B, k, 3, H, W), mean, logvar (B, N, d) each."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.encoder, self.decoder = cfg, NeRVEncoder(cfg), GenerativeNeRV(cfg)

    def encode(self, video):
        """Shapes: video (B, T, 3, H, W) in [-1, 1] -> mean, logvar (B, N, d) each."""
        return self.encoder(video)

    def decode(self, tokens, frame):
        """Shapes: tokens (B, N, d), frame (k,) float -> (B, k, 3, H, W) in [-1, 1]."""
        return self.decoder(tokens, frame)

    def forward(self, video, frame):
        mean, logvar = self.encode(video)
        tokens = mean + (logvar / 2).exp() * torch.randn_like(mean)                 # (B, N, d)
        return self.decode(tokens, frame), mean, logvar


class Discriminator(nn.Module):
    """3-D StyleGAN-like critic: five residual blocks, each halving time, height and width.

    Shapes:  video (B, 3, T, H, W) -> (B,) logit, high for real
    Source:  paper Sec. 3.1, A.1 (5 blocks, 64 wide, "multiplier of 2 for each block"). Choice: widths 64 * (2, 4, 4,
             4, 4) as MAGVIT's, 15.3M parameters at 16 x 128 x 128; doubling five times would need 296M
    """

    def __init__(self, cfg):
        super().__init__()
        widths = [64, 128, 256, 256, 256, 256]
        size = np.array([cfg.frames_per_step or cfg.frames, cfg.resolution, cfg.resolution])
        conv = lambda a, b: nn.Conv3d(a, b, 3, padding=1)
        self.stem = conv(3, widths[0])
        self.blocks = nn.ModuleList(
            nn.ModuleDict(dict(a=conv(c, c), b=conv(c, wider), side=nn.Conv3d(c, wider, 1, bias=False)))
            for c, wider in zip(widths, widths[1:]))
        for _ in self.blocks:
            size = -(-size // 2)                                                    # ceil, so that 16 frames do
        self.last = conv(widths[-1], widths[-1])
        self.fc = nn.Linear(widths[-1] * int(size.prod()), widths[-1])
        self.logit = nn.Linear(widths[-1], 1)

    def forward(self, video):
        lrelu = lambda x: F.leaky_relu(x, 0.2)
        halve = lambda x: F.avg_pool3d(x, [min(2, n) for n in x.shape[2:]], ceil_mode=True)     # 16 frames: 1 after 4
        x = lrelu(self.stem(video))                                                 # (B, 64, T, H, W)
        for block in self.blocks:
            y = lrelu(block["b"](halve(lrelu(block["a"](x)))))                      # (B, wider, T/2, H/2, W/2)
            x = (y + block["side"](halve(x))) / math.sqrt(2)
        x = lrelu(self.last(x)).flatten(1)                                          # (B, 256 * T/32 * H/32 * W/32)
        return self.logit(lrelu(self.fc(x)))[:, 0]                                  # (B,)


# ---------------------------------------------------------------------------------------------- losses

def kl_divergence(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats of each token channel. Shapes: (B, N, d) twice -> (B, N, d).

    Source: paper Eq. 1 prints the arguments the other way round; departs: this order, every VAE's, has the closed form
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def psnr_from_mse(mse):
    """Peak signal-to-noise ratio in dB from a squared error of pixels in [-1, 1], whose peak-to-peak is 2."""
    return 10 * math.log10(4 / max(float(mse), 1e-12))


def critic_loss(critic, real, fake, r1_weight):
    """Non-saturating logistic loss of the discriminator, with R1 on request; real and fake are (B, 3, T, H, W).

    Source: choice (the paper names no GAN loss): as StyleGAN and MAGVIT
    """
    real = real.detach().requires_grad_(r1_weight > 0)
    d_real, d_fake = critic(real), critic(fake.detach())                            # (B,) each
    loss = F.softplus(-d_real).mean() + F.softplus(d_fake).mean()
    if r1_weight:
        slope, = torch.autograd.grad(d_real.sum(), real, create_graph=True)
        loss = loss + r1_weight / 2 * slope.square().sum((1, 2, 3, 4)).mean()
    return loss, d_real.mean(), d_fake.mean()


# ---------------------------------------------------------------------------------------------- shared by both stages

def save_checkpoint(path, state):
    """Write a dict of tensors and plain Python to a temporary name, then rename it: no crash leaves half a file."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load_checkpoint(path, device, made_by):
    """The dict that save_checkpoint wrote; SystemExit that names the command `made_by` where there is none."""
    if not Path(path).is_file():
        raise SystemExit(f"no checkpoint at {path}; make it with: {made_by}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:                          # a damaged pickle raises nearly anything
        raise SystemExit(f"{path} is not a checkpoint of ours, or is damaged ({type(error).__name__})") from error


# A run may continue with other values of these; any other change would silently make it another experiment.
HARMLESS = {"steps", "log_every", "eval_every", "out", "resume", "workers", "compile", "data_root",
            "sampler", "sample_steps", "guidance"}


def resume_or_start(cfg, device):
    """The checkpoint to continue from, or None; refuses to continue with settings that differ where it matters."""
    path = Path(cfg.out) / "ckpt.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not cfg.resume:
        os.replace(path, path.with_name("ckpt.old.pt"))
        path.with_name("log.jsonl").unlink(missing_ok=True)
    if not path.exists():
        return None
    ckpt = load_checkpoint(path, device, "this command")
    ours = dataclasses.asdict(cfg)
    differ = [f"--{k.replace('_', '-')} {v} (now {ours.get(k)})" for k, v in ckpt["config"].items()
              if k not in HARMLESS and ours.get(k) != v]
    if differ:
        raise SystemExit(f"{path} was trained with {', '.join(differ)}; use those, another --out, or --no-resume")
    print(f"continuing {path} at step {ckpt['step']} of {cfg.steps}; --no-resume starts over")
    return ckpt


def learning_rate(step, cfg):
    """Linear warmup to cfg.lr, then a cosine to zero at cfg.steps (paper A.1)."""
    decay = max(0.0, (step - cfg.warmup) / max(cfg.steps - cfg.warmup, 1))
    return cfg.lr * min((step + 1) / max(cfg.warmup, 1), 0.5 * (1 + math.cos(math.pi * decay)))


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """Move averaged weights towards the new ones, faster in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def batches(dataset, cfg, start):
    """Endless loader from step `start` on. Which videos, frames and flips step s sees depends on (seed, s) alone."""
    def keys():
        for step in range(start, cfg.steps):
            rng = np.random.default_rng([cfg.seed, step])
            yield [(int(rng.integers(len(dataset))), int(rng.integers(2 ** 62))) for _ in range(cfg.batch)]
    return torch.utils.data.DataLoader(dataset, batch_sampler=keys(), num_workers=cfg.workers,
                                       pin_memory=torch.cuda.is_available())


class OneClip:
    """A data set that is one clip of another one, over and over: what --overfit trains on."""

    def __init__(self, dataset):
        self.item, self.classes, self.files = dataset[0, 0], dataset.classes, None

    def __len__(self):
        return 1

    def __getitem__(self, key):
        return self.item


def listen_for_stop():
    """A list that SIGINT or SIGTERM puts its number into, so that the loop can finish its step, save and leave."""
    seen = []

    def note(number, _):
        if seen:
            raise KeyboardInterrupt                     # asked twice: do not wait for the step
        seen.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return seen


def pick_device():
    """CUDA where there is one. Denormal floats are flushed: on a CPU they are slow and mean nothing here."""
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------------------------------------- training

@torch.no_grad()
def measure_batchnorm(ema, dataset, cfg, device):
    """Give the averaged weights BatchNorm statistics of their own, from 16 batches of training clips.

    Those of the raw weights do not fit them: on toy clips that mismatch costs 1.3 dB after 1500 steps.
    """
    ema.encoder.norm.reset_running_stats()
    ema.encoder.norm.momentum = None                    # a plain mean over the batches
    ema.train()
    for (video, _), _ in zip(batches(dataset, cfg, 0), range(min(16, cfg.steps))):
        ema.encode(video.to(device))
    ema.eval()


@torch.no_grad()
def evaluate(model, clips, picture):
    """Mean PSNR in dB over clips, frame by frame, through mean tokens; writes originals, reconstructions, differences.

    Shapes: clips (n, T, 3, H, W) in [-1, 1]
    """
    device, frame = next(model.parameters()).device, torch.arange(clips.shape[1]).float()
    recon = torch.cat([model.decode(model.encode(c.to(device))[0], frame.to(device)).cpu() for c in clips.split(8)])
    mse = (recon - clips).square().mean((2, 3, 4))                                  # (n, T)
    show = slice(0, min(8, len(clips)))
    difference = (recon - clips).abs().sub(1)                                       # black where they agree
    save_video(picture, tile(torch.cat([clips[show], recon[show], difference[show]]), min(8, len(clips))))
    return float((10 * torch.log10(4 / mse.clamp(min=1e-12))).mean())


def train(cfg):
    """Train stage 1; write out/ckpt.pt, out/log.jsonl and pictures. Returns the checkpoint's path."""
    device, path = pick_device(), Path(cfg.out) / "ckpt.pt"
    if cfg.gan_weight and cfg.frames_per_step not in (0, cfg.frames):
        raise SystemExit("the discriminator looks at whole clips: --gan-weight needs --frames-per-step 0")
    ckpt = resume_or_start(cfg, device)
    clips, held_out = build_dataset(cfg), build_dataset(cfg, held_out=True)
    if cfg.overfit:
        clips, held_out = OneClip(clips), []
    name, source = ("psnr_held_out", held_out) if len(held_out) else ("psnr_train", clips)
    shown = np.random.default_rng(0).permutation(len(source))[:64]
    eval_clips = torch.stack([source[int(i), 0][0] for i in shown])                 # (n, T, 3, H, W)

    torch.manual_seed(cfg.seed)
    model = NeRVVAE(cfg).to(device)
    ema = NeRVVAE(cfg).to(device).eval().requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    state = dict(model=model, ema=ema, opt=opt)
    if cfg.gan_weight:
        critic = Discriminator(cfg).to(device)
        opt_d = torch.optim.AdamW(critic.parameters(), betas=(0.0, 0.99), weight_decay=0.0, fused=True)    # MAGVIT's
        state.update(critic=critic, opt_d=opt_d)
    if cfg.lpips_weight:
        import lpips
        perceptual = lpips.LPIPS(net=cfg.lpips_net, verbose=False).to(device).requires_grad_(False)
    step = 0
    if ckpt:
        step = ckpt["step"]
        for key, thing in state.items():
            thing.load_state_dict(ckpt[key])
    forward = torch.compile(model) if cfg.compile and device.type == "cuda" else model     # we go on saving `model`
    amp = torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16 and device.type == "cuda")

    def save():
        save_checkpoint(path, dict(step=step, config=dataclasses.asdict(cfg), classes=clips.classes,
                                   **{key: thing.state_dict() for key, thing in state.items()}))

    size = sum(p.numel() for p in model.encoder.parameters()), sum(p.numel() for p in model.decoder.parameters())
    print(f"stage 1 on {device}: {len(clips)} videos, encoder {size[0] / 1e6:.2f}M, decoder {size[1] / 1e6:.2f}M "
          f"parameters, {cfg.tokens} tokens of {cfg.token_dim}")
    bar = tqdm(total=cfg.steps, initial=step, desc="stage 1", unit="step", smoothing=0.05)
    since, shown_at, stop = time.perf_counter(), step, listen_for_stop()
    for video, _ in batches(clips, cfg, step):
        torch.manual_seed(cfg.seed * 1_000_003 + step)                              # all noise of step s from (seed, s)
        video = video.to(device, non_blocking=True)                                 # (B, T, 3, H, W)
        k = cfg.frames_per_step or cfg.frames
        frame = torch.randperm(cfg.frames)[:k].sort()[0].to(device)                 # (k,)

        # 1. Encode, sample the tokens, decode k frames.
        with amp:
            recon, mean, logvar = forward(video, frame.float())                     # (B, k, 3, H, W), (B, N, d) twice
        recon, target = recon.float(), video[:, frame]
        # 2. Eq. 1: look like the video, to the eye and to the critic, with tokens close to N(0, 1).
        mse, kl = F.mse_loss(recon, target), kl_divergence(mean, logvar)            # scalar, (B, N, d)
        loss, parts = mse + cfg.kl_weight * kl.sum((1, 2)).mean(), {}
        with amp:
            if cfg.lpips_weight:
                parts["lpips"] = perceptual(recon.flatten(0, 1), target.flatten(0, 1)).float().mean()
                loss = loss + cfg.lpips_weight * parts["lpips"]
            if cfg.gan_weight and step >= cfg.gan_start:
                critic.requires_grad_(False)
                parts["gan"] = F.softplus(-critic(recon.transpose(1, 2)).float()).mean()
                loss = loss + cfg.gan_weight * parts["gan"]
        # 3. One optimizer step, then the averaged weights follow.
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, cfg)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        parts["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        opt.step()
        update_ema(ema, model, cfg.ema, step)
        # 4. Every few steps the critic learns to tell the two apart.
        if cfg.gan_weight and step >= cfg.gan_start and step % cfg.gan_every == 0:
            critic.requires_grad_(True)
            with amp:
                r1 = cfg.r1_weight * 16 if step // cfg.gan_every % 16 == 0 else 0   # lazily, 16 times as strong
                loss_d, parts["d_real"], parts["d_fake"] = critic_loss(
                    critic, target.transpose(1, 2), recon.transpose(1, 2), r1)
            for group in opt_d.param_groups:
                group["lr"] = cfg.gan_lr_ratio * learning_rate(step, cfg)
            opt_d.zero_grad(set_to_none=True)
            loss_d.backward()
            opt_d.step()
        step += 1
        bar.update()

        if step % cfg.log_every == 0 or step % cfg.eval_every == 0 or step == cfg.steps:
            row = dict(step=step, loss=loss.item(), mse=mse.item(), psnr=psnr_from_mse(mse),
                       kl_per_dim=kl.mean().item(), token_std=mean.std().item(),
                       posterior_std=(logvar / 2).exp().mean().item(),
                       **{key: value.item() for key, value in parts.items()}, lr=opt.param_groups[0]["lr"],
                       clips_per_s=cfg.batch * (step - shown_at) / (time.perf_counter() - since))
            if step % cfg.eval_every == 0 or step == cfg.steps:
                measure_batchnorm(ema, clips, cfg, device)
                row[name] = evaluate(ema, eval_clips, path.with_name(f"step_{step:06d}.gif"))
                bar.write(f"step {step}: {name} {row[name]:.2f} dB, KL {row['kl_per_dim']:.2f} nats a channel")
                save()
            bar.set_postfix(psnr=f"{row['psnr']:.1f}dB", kl=f"{row['kl_per_dim']:.2f}")
            with open(path.with_name("log.jsonl"), "a") as log:
                log.write(json.dumps(row) + "\n")
            since, shown_at = time.perf_counter(), step
        if stop:
            save()
            bar.close()
            print(f"stopped at step {step}; the same command continues {path}")
            raise SystemExit(128 + stop[0])
    bar.close()
    return path


def load_vae(path, device):
    """The trained tokenizer: averaged weights, frozen, in evaluation mode, with .cfg and .classes."""
    ckpt = load_checkpoint(path, device, "python nerv_vae.py")
    model = NeRVVAE(Config(**ckpt["config"])).to(device).eval().requires_grad_(False)
    model.load_state_dict(ckpt["ema"])
    model.classes, model.step = ckpt["classes"], ckpt["step"]
    return model


def main(argv=None):
    """Command line of stage 1. Returns the path of the checkpoint."""
    return train(parse_config(Config, PRESETS, argv))


if __name__ == "__main__":
    main()
