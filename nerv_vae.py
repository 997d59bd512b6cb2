"""Stage 1: a VAE whose latent code is the weights of a small video network.

    video (B, T, 3, H, W) -> patches (B, P, patch values) -> ViT over [patches ; N queries] -> keep the N queries
      -> BatchNorm -> FC -> mean, logvar (B, N, d) -> z = mean + sigma * eps = the weight tokens
      -> GenerativeNeRV(z, frame) -> video (B, T, 3, H, W)

    python nerv_vae.py                                              # toy clips, laptop CPU, a few minutes
    python nerv_vae.py --dataset ucf --data-root UCF-101 --out out/ucf      # the paper's run (S; --model B, L)
    python nerv_vae.py --dataset folder --data-root my_videos --out out/my  # any tree of videos
    python nerv_vae.py --dataset nerv_enc --data-root k400 --out out/enc    # the paper's forerunner, NeRV-Enc
    torchrun --nproc_per_node=8 nerv_vae.py --dataset ucf ...               # --batch stays what all do together

It writes out/vae/: ckpt.pt (all that stage 2 and sample.py need), log.jsonl (one line a log step), step_XXXXXX.gif
(held-out originals over reconstructions over their difference). The same command again continues where it stopped.

Letters: B videos, T frames, k of them decoded in a step, H = W pixels, P patches, N weight tokens, d channels a token.
Ranges:  pixels are in [-1, 1]; tokens are pulled towards N(0, 1) by the KL term; `frame` is 0..T-1.
"""
import atexit
import ctypes
import dataclasses
import json
import math
import os
import platform
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import build_dataset, degrade, load_lpips, parse_config, save_video, tile
from generative_nerv import GenerativeNeRV, sinusoids


@dataclass(frozen=True)
class Config:
    """Settings of stage 1; the defaults are the toy preset. Paper: A.1, A.2, Table A1; the rest is choice."""

    # data
    dataset: str = "toy"            # toy|ucf|ucf256|k600|folder|laptop|workstation|nerv_enc: clips, row of presets
    data_root: str = ""             # folder of videos, one sub-folder a class (not needed for toy)
    split: str = "all"              # all, train, test or a list of groups such as 1-19,23: the videos that train
    frames: int = 8                 # T, frames per clip (paper: 16)
    stride: int = 1                 # step in the file between frames of a clip; 0 spreads them over the whole file
    resolution: int = 32            # H = W in pixels (paper: 128 and 256)
    flip: bool = False              # mirror half of the clips (choice: on for real footage, as LARP)
    in_memory: bool = False         # keep every video that was read, whole and resized: small ones are decoded once
    degrade: str = "none"           # none|downsample|blur|inpaint: what the encoder is shown instead (NeRV-Enc Table 8)
    workers: int = 0                # loader processes of each rank; 0 reads in the training process
    # weight tokens and decoder
    model: str = "16"               # decoder width D: S, B, L (128, 256, 512; A.2) or a number; nerv_dec: NeRV-Enc's
    tokens: int = 32                # N, weight tokens a video (paper: 128, and 160 at 256 x 256)
    token_dim: int = 32             # d, channels a weight token (paper: 128)
    gen_channels: int = 8           # generated block of a D -> D kernel: this many inputs and outputs (paper: 64)
    pe_size: int = 8                # height and width of the positional input (paper Table 2c: 8 is best)
    pe_dim: int = 16                # sinusoids for each of time, height and width (paper A.2)
    pe_base: float = 10.0           # the slowest sinusoid is nearly this many times slower than the fastest (choice)
    parameterization: str = "channel"   # channel|fmm|repeat: how tokens enter a kernel (paper Table 2a)
    reuse: str = "heads"            # heads|direct|none: how layers share the tokens (paper Table 2b)
    upsample: str = "transposed"    # transposed|pixelshuffle|bilinear: what doubles the size (paper Table 2d)
    side: str = "residual"          # residual|skip|none: side connections (paper Table 2e)
    kernel_init: float = 0.1        # std of kernels at the start; smaller ones turn faster under Adam (choice)
    layer_tokens: str = ""          # tokens x channels of each layer, as 4x256,0x0; empty: all read all (NeRV-Enc A.5)
    expand: str = "in"              # in|out|taps: with repeat, along which side numbers repeat (NeRV-Enc B c)
    normalize: bool = True          # divide every kernel by its norm (paper Sec. 3.1; NeRV-Enc B a)
    conv_init: bool = True          # kernels start normal; off: as signs (NeRV-Enc B b names nothing: choice)
    # encoder
    enc_depth: int = 2              # transformer blocks (paper: 18)
    enc_heads: int = 4              # attention heads (paper: 14)
    enc_dim: int = 128              # width of the transformer (paper: 896)
    patch: int = 8                  # patch height and width in pixels (paper: 8)
    patch_frames: int = 2           # patch depth in frames (paper: 1)
    logvar_start: float = -5.0      # log-variance of the posterior at the start: narrow, so tokens carry signal
    # losses (paper Eq. 1)
    kl_weight: float = 1e-6         # times the KL in nats summed over tokens, channels (paper A.1: 1e-5; choice: sum)
    edge_weight: float = 0.0        # times the squared error of steps from pixel to pixel (departs: not in Eq. 1)
    lpips_weight: float = 0.0       # perceptual loss (paper: 1); 0 downloads nothing
    lpips_start: int = 0            # first step of the perceptual loss: without it, steps cost less (paper: 0)
    lpips_net: str = "vgg"          # vgg|alex|squeeze: network of the perceptual loss (choice: vgg as LARP)
    gan_weight: float = 0.0         # adversarial loss (paper A.1: 1)
    gan_channels: int = 64          # width of the discriminator's first layer (paper A.1: 64)
    gan_start: int = 0              # first step of the discriminator and its loss (choice: 100,000 of the paper's 2M)
    gan_every: int = 5              # the discriminator learns every so many steps (paper A.1)
    gan_lr_ratio: float = 0.2       # its learning rate over the autoencoder's (paper A.1: one fifth)
    r1_weight: float = 0.0          # R1 gradient penalty on every 16th discriminator step (choice: off)
    # optimisation
    batch: int = 8                  # B, clips per step (paper E.17: 32)
    steps: int = 4000               # optimizer steps (paper A.1: 2M)
    lr: float = 2e-3                # peak learning rate (paper A.1: 1e-4)
    muon: bool = False              # Muon for the matrices of the encoder (departs: AdamW for all, paper A.1)
    warmup: int = 100               # steps of linear warmup before the cosine decay (paper A.1, length: choice)
    clip: float = 1.0               # largest gradient norm (choice)
    ema: float = 0.999              # decay of the averaged weights that everything after training uses (choice)
    frames_per_step: int = 2        # frames decoded of a clip in a step (none needs another); 0: all, as ever with GAN
    grad_accum: int = 1             # passes that share an optimizer step, to fit a batch into memory
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
             kernel_init=1.0, enc_depth=18, enc_heads=14, enc_dim=896, patch_frames=1,
             kl_weight=1e-5, lpips_weight=1.0, gan_weight=1.0, gan_start=100_000, batch=32, steps=2_000_000, lr=1e-4,
             warmup=10_000, ema=0.9999, frames_per_step=0, bf16=True, compile=True, log_every=100, eval_every=10_000)
NERV_ENC = {**PAPER, "frames": 8, "stride": 0, "resolution": 256, "flip": False, "model": "nerv_dec", "pe_size": 1,
            "tokens": 196, "token_dim": 288, "layer_tokens": "4x256,128x144,64x288,0x0", "parameterization": "repeat",
            "side": "none", "enc_depth": 6, "enc_heads": 12, "enc_dim": 720, "patch": 64,       # 46.8M, A.2: 47.6M
            "logvar_start": -30.0, "kl_weight": 0.0, "lpips_weight": 0.0, "gan_weight": 0.0,    # no VAE: mean tokens
            "steps": 46_875, "warmup": 1000, "eval_every": 2500}    # Table 7: 150 epochs of 10k videos; warmup: choice
LAPTOP = dict(stride=2, flip=True, in_memory=True, model="32", gen_channels=16, enc_dim=192, kl_weight=5e-7,
              edge_weight=1.0, lpips_weight=0.2, lpips_start=7000, lpips_net="squeeze", steps=11_000, lr=1e-3,
              muon=True)                                          # a folder of real videos at 32 x 32 x 8, on a CPU
WORKSTATION = {**LAPTOP, "frames": 16, "stride": 1, "resolution": 64, "in_memory": False, "workers": 8, "model": "S",
               "tokens": 64, "token_dim": 64, "gen_channels": 64, "enc_depth": 6, "enc_heads": 6, "enc_dim": 384,
               "gan_weight": 0.1, "gan_start": 2125, "gan_every": 1, "gan_lr_ratio": 2.0, "lpips_start": 1000,
               "batch": 32, "steps": 2500, "warmup": 200, "frames_per_step": 4, "bf16": True}   # minutes on a large GPU
PRESETS = {"toy": {}, "ucf": PAPER, "ucf256": {**PAPER, "resolution": 256, "tokens": 160, "checkpointing": True},
           "k600": PAPER, "folder": PAPER, "laptop": LAPTOP, "workstation": WORKSTATION, "nerv_enc": NERV_ENC}
MADE_BY = "python nerv_vae.py"                                    # stands in the checkpoint


# -------------------------------------------------------- several processes: one is enough to follow; skip at first

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # as torchrun says; else alone
LIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None            # the allocator of most Linux systems


def pick_device():
    """This rank's device, CUDA where there is one; joins the other ranks. Denormals are flushed, as they are slow."""
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")
    cuda = torch.cuda.is_available()
    if LIBC and not cuda:                               # keep freed memory: a page taken anew costs a fault, every step
        LIBC.mallopt(-4, 0)                             # M_MMAP_MAX: no mapping of its own for a large tensor
        LIBC.mallopt(-1, -1)                            # M_TRIM_THRESHOLD: nothing is given back
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if WORLD > 1 and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(device)
        # Rank 0 may scan a large folder for hours while the others wait; a rank that dies is torchrun's to notice.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=1))
        atexit.register(leave_ranks)
    return device


def leave_ranks():
    """Leave the other ranks before Python shuts down: a gloo thread that frees its last tensor then aborts the run."""
    dist.destroy_process_group()
    time.sleep(0.5)                                     # leaves them the interpreter's lock for that


def average_gradients(model):
    """Give every rank the mean of all ranks' gradients, in one message once all are there: no bucket, no overlap."""
    if WORLD > 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, mean in zip(grads, flat.div_(WORLD).split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))


class SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors; so is its gradient. (The one of torch.distributed.nn does not compile.)"""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return SumOverRanks.apply(grad)


def agree(numbers):
    """The largest of all ranks' numbers (or of each in a list), and a meeting point: all wait until all are here."""
    value = torch.tensor(numbers)
    if WORLD > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.tolist()


@contextmanager
def first_rank_first():
    """What rank 0 does in here (scan a folder, download weights) is there for the others when their turn comes."""
    if RANK:
        agree(0)
    yield
    if not RANK:
        agree(0)


def all_at_one_step(step, path):
    """Raise SystemExit where ranks found different checkpoints: they would average different models' gradients."""
    high, low = agree([step, -step])
    if high != -low:
        raise SystemExit(f"ranks found {path} at steps {-low} to {high}; --out must be one folder for all of them")


def my_share(cfg):
    """The slice of a batch of cfg.batch that this rank works on. Raises SystemExit where it does not divide."""
    if cfg.grad_accum < 1 or cfg.batch < 1 or cfg.batch % (WORLD * cfg.grad_accum):
        raise SystemExit(f"--batch {cfg.batch} does not divide into {WORLD} processes times --grad-accum "
                         f"{cfg.grad_accum}; --batch is what all of them do together in a step")
    each = cfg.batch // WORLD
    return slice(RANK * each, (RANK + 1) * each)


# ---------------------------------------------------------------------------------------------- model

class Attention(nn.Module):
    """Multi-head self-attention. Shapes: (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise SystemExit(f"{heads} attention heads do not divide a width of {dim}; change one of the two")
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


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d whose statistics are taken over the tokens of all ranks. Shapes: (n, dim) -> (n, dim)."""

    def forward(self, x):
        if WORLD == 1 or not self.training:
            return super().forward(x)
        mean = SumOverRanks.apply(x.mean(0)) / WORLD                                # (dim,)
        x = x - mean                                    # first, as E[x^2] - mean^2 cancels where the mean is large
        var, n = SumOverRanks.apply(x.square().mean(0)) / WORLD, WORLD * len(x)     # (dim,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            weight = self.momentum or 1 / self.num_batches_tracked
            self.running_mean.lerp_(mean, weight)
            self.running_var.lerp_(var * n / (n - 1), weight)
        return x * (var + self.eps).rsqrt() * self.weight + self.bias


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
        self.norm = BatchNorm(dim)
        self.bottleneck = nn.Linear(dim, 2 * cfg.token_dim)
        nn.init.zeros_(self.bottleneck.weight[cfg.token_dim:])
        nn.init.constant_(self.bottleneck.bias[cfg.token_dim:], cfg.logvar_start)

    def forward(self, video):
        B, T, _, H, W = video.shape
        p, f = self.cfg.patch, self.cfg.patch_frames
        x = video.view(B, T // f, f, 3, H // p, p, W // p, p)                       # (B, T/f, f, 3, h, p, w, p)
        x = x.permute(0, 1, 4, 6, 2, 3, 5, 7)                                       # (B, T/f, h, w, f, 3, p, p)
        x = x.flatten(4).flatten(1, 3)                                              # (B, P, f*3*p*p)
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
    """Both halves.

    Shapes: video (B, T, 3, H, W), frame (k,), noise (B, N, d) -> recon (B, k, 3, H, W), mean, logvar (B, N, d) each
    Units:  noise ~ N(0, 1), given from outside, so that a step does not depend on how its batch is divided
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.encoder, self.decoder = cfg, NeRVEncoder(cfg), GenerativeNeRV(cfg)

    def encode(self, video):
        """Shapes: video (B, T, 3, H, W) in [-1, 1] -> mean, logvar (B, N, d) each; what no layer reads is zero."""
        mean, logvar = self.encoder(video)
        return mean * self.decoder.used, logvar

    def decode(self, tokens, frame):
        """Shapes: tokens (B, N, d), frame (k,) float -> (B, k, 3, H, W) in [-1, 1]."""
        return self.decoder(tokens, frame)

    def play(self, tokens):
        """All trained frames, one video at a time: feature maps are large.

        Shapes: tokens (n, N, d) -> (n, T, 3, H, W) in [-1, 1], on the CPU
        """
        frame = torch.arange(self.cfg.frames, device=tokens.device).float()
        return torch.cat([self.decode(one, frame).cpu() for one in tokens.split(1)])

    def forward(self, video, frame, noise):
        mean, logvar = self.encode(video)
        tokens = mean + (logvar / 2).exp() * noise                                  # (B, N, d)
        return self.decode(tokens, frame), mean, logvar


class Discriminator(nn.Module):
    """3-D StyleGAN-like critic: five residual blocks, each halving time, height and width.

    Shapes:  video (B, 3, T, H, W) -> (B,) logit, high for real
    Source:  paper Sec. 3.1, A.1 (5 blocks, 64 wide, "multiplier of 2 for each block"). Choice: widths 64 * (2, 4, 4,
             4, 4) as MAGVIT's, 15.3M parameters at 16 x 128 x 128; doubling five times would need 296M. C is the
             first width, cfg.gan_channels
    """

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.gan_channels * times for times in (1, 2, 4, 4, 4, 4)]
        size = np.array([cfg.frames, cfg.resolution, cfg.resolution])
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
        x = lrelu(self.stem(video))                                                 # (B, C, T, H, W)
        for block in self.blocks:
            y = lrelu(block["b"](halve(lrelu(block["a"](x)))))                      # (B, wider, T/2, H/2, W/2)
            x = (y + block["side"](halve(x))) / math.sqrt(2)
        x = lrelu(self.last(x)).flatten(1)                                          # (B, 4C * T/32 * H/32 * W/32)
        return self.logit(lrelu(self.fc(x)))[:, 0]                                  # (B,)


# ---------------------------------------------------------------------------------------------- losses

def kl_divergence(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats of each token channel. Shapes: (B, N, d) twice -> (B, N, d).

    Source: paper Eq. 1 prints the arguments the other way round; departs: this order is the one in every VAE's bound
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def edge_error(recon, target):
    """Mean squared error of the steps from each pixel to its neighbours, across plus down.

    Shapes: recon, target (..., H, W) in [-1, 1] -> scalar, a squared pixel value like the plain squared error
    Source: departs, presets laptop and workstation only (the paper has no such term): errors of fine detail are small,
            so the plain squared error teaches it last, and a short run ends before; on UCF-101 clips 0.4 dB after 2000
            steps of laptop
    """
    error = recon - target                                                          # (..., H, W)
    return error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()


def psnr_from_mse(mse):
    """Peak signal-to-noise ratio in dB from squared errors of pixels in [-1, 1], whose peak-to-peak is 2; any shape."""
    return 10 * torch.log10(4 / torch.as_tensor(mse).clamp(min=1e-12))


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


# --------------------------------------------------- shared by both stages: files, signals, ranks; skip at first

def save_checkpoint(path, state):
    """Write a dict of tensors and plain Python beside `path`, flush, then rename: no crash leaves half a file.

    Only rank 0 writes. A full or read-only disk is told in one line and not raised, as training can still outlive it;
    the checkpoint before stays. Returns whether the file was written.
    """
    if RANK:
        return True
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        with suppress(OSError):                         # the new name, too; some network disks cannot sync a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:            # torch turns a failed write into a RuntimeError
        reason = error.strerror if isinstance(error, OSError) else f"is the disk full? {str(error).splitlines()[0]}"
        print(f"could not write {path} ({reason}); what was there stays, the next save tries again", file=sys.stderr)
        with writing(part):
            part.unlink(missing_ok=True)
        return False
    return True


@contextmanager
def writing(what):
    """Around a log line or a picture: a disk that is full is told in one line, and does not end the run."""
    try:
        yield what
    except OSError as error:
        print(f"could not write {what} ({error.strerror or error}); training goes on", file=sys.stderr)


def load_checkpoint(path, device, made_by):
    """The dict that save_checkpoint wrote, parsed as data: no code in the file is run, no size in it is believed.

    Raises: SystemExit naming the command `made_by` where there is no file, or what is wrong with the file
    """
    if not Path(path).is_file():
        raise SystemExit(f"no checkpoint at {path}; make it with: {made_by}")
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(m.compress_type == zipfile.ZIP_STORED for m in archive.infolist())
            whole = stored and archive.testzip() is None                            # every member's checksum
        if whole:
            ckpt = torch.load(path, map_location=device, weights_only=True)
            if ckpt["made_by"] == made_by:
                return ckpt
    except PermissionError as error:
        raise SystemExit(f"{path} may not be read ({error.strerror})") from error
    except Exception as error:                          # a damaged archive raises nearly anything
        raise SystemExit(f"{path} is not a checkpoint of ours, or is damaged ({type(error).__name__})") from error
    raise SystemExit(f"{path} was not made by {made_by}, but by {ckpt['made_by']}" if whole else
                     f"{path} is damaged: its checksums do not agree with its contents")


# A run may continue with other values of these; any other change would silently make it another experiment.
HARMLESS = {"steps", "log_every", "eval_every", "out", "resume", "workers", "in_memory", "compile", "checkpointing",
            "data_root", "sampler", "sample_steps", "guidance"}


def resume_or_start(cfg, device, made_by):
    """The checkpoint to continue from, or None; refuses to continue with settings that differ where it matters."""
    path = Path(cfg.out) / "ckpt.pt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").unlink(missing_ok=True)                           # a save that was killed half-way
        if not cfg.resume and not RANK:
            for old in [p for p in (path, path.with_name("best.pt")) if p.exists()]:
                os.replace(old, old.with_suffix(".old.pt"))
            path.with_name("log.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {cfg.out} cannot be written ({error.strerror}); choose another folder") from error
    agree(0)
    if not path.exists():
        return None
    ckpt = load_checkpoint(path, device, made_by)
    ours = dataclasses.asdict(cfg)
    differ = [f"--{k.replace('_', '-')} {v} (now {ours.get(k)})" for k, v in ckpt["config"].items()
              if k not in HARMLESS and ours.get(k) != v]
    if differ:
        raise SystemExit(f"{path} was trained with {', '.join(differ)}; use those, another --out, or --no-resume")
    if not RANK:
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


def batch_keys(dataset, cfg, step):
    """The (video, seed) pairs of step `step`: they follow from (cfg.seed, step) alone, for all ranks together."""
    rng = np.random.default_rng([cfg.seed, step])
    return [(int(rng.integers(len(dataset))), int(rng.integers(2 ** 62))) for _ in range(cfg.batch)]


def batches(dataset, cfg, start):
    """Endless loader of this rank's share of each batch, from step `start` on."""
    keys = (batch_keys(dataset, cfg, step)[my_share(cfg)] for step in range(start, cfg.steps))
    return torch.utils.data.DataLoader(dataset, batch_sampler=keys, num_workers=cfg.workers,
                                       pin_memory=torch.cuda.is_available())


def names_of(dataset, keys):
    """What to call the videos of a batch in a message."""
    return [str(dataset.files[i]) if dataset.files else f"clip {i}" for i, _ in keys]


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
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt                     # Ctrl-C twice: do not wait for the step
        seen.append(number)                             # SIGTERM comes twice where a scheduler signals every process

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return seen


def add_up(terms, passes, **values):
    """Add each value's share to its mean over the passes of a step; tensors stay where they are, nothing waits."""
    for key, value in values.items():
        terms[key] = terms.get(key, 0) + value.detach().float() / passes


def mean_over_ranks(terms):
    """A dict of scalar tensors as plain numbers, each the mean over ranks: the only place that waits for the GPU."""
    values = torch.stack(list(terms.values())).cpu()
    if WORLD > 1:
        dist.all_reduce(values)
    return dict(zip(terms, (values / WORLD).tolist()))


def write_log(path, row):
    """Append one line to log.jsonl; only rank 0 does."""
    if not RANK:
        with writing(path), open(path, "a") as log:
            log.write(json.dumps(row) + "\n")


def not_finite(row, bad, names):
    """What to say when ten steps in a row were skipped."""
    terms = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "clips_per_s")
    return (f"{int(bad)} steps in a row had a loss or gradient that is not a number, and were skipped; stopped at "
            f"{terms}; this batch: {', '.join(names)}. The checkpoint is from before; lower --lr, or look at these")


def leave(step, path, heard, saved):
    """End a run that was asked to stop by signal `heard`."""
    if not saved:
        raise SystemExit(f"stopped at step {step}, and the save of {path} failed: it is from an earlier step")
    if not RANK:
        print(f"stopped at step {step}; the same command continues {path}")
    raise SystemExit(128 + heard)


def guarded_step(opt, model, limit, bad, muon=None):
    """Average gradients over ranks, clip them to norm `limit`, step; but skip the step where one is not finite.

    `bad` (2,) counts the skipped steps: all, and in a row. Returns the norm. AdamW never waits for the GPU: its fused
    form looks at `found_inf` itself, as it does for torch's gradient scaler. Muon has no such form and waits.
    """
    average_gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    opt.found_inf = (~norm.isfinite()).float()
    opt.step()
    if muon and norm.isfinite():
        muon.step()
    bad[0] += opt.found_inf
    bad[1] = (bad[1] + 1) * opt.found_inf
    return norm


# ---------------------------------------------------------------------------------------------- training

@torch.no_grad()
def measure_batchnorm(ema, dataset, cfg, device):
    """Give the averaged weights BatchNorm statistics of their own, from 16 batches of training clips.

    Those of the raw weights do not fit them: on toy clips that mismatch costs 1.3 dB after 1500 steps.
    """
    ema.encoder.norm.reset_running_stats()
    ema.encoder.norm.momentum = None                    # a plain mean over the batches
    ema.train()
    for _, (video, _) in zip(range(min(16, cfg.steps)), batches(dataset, cfg, 0)):
        ema.encode(degrade(video.to(device), cfg.degrade))
    ema.eval()


@torch.no_grad()
def evaluate(model, clips, picture):
    """Mean PSNR in dB over clips, frame by frame, through mean tokens: of the output, and of what the encoder saw.

    Writes a picture: originals over what was seen (if that is another thing), reconstructions, differences.
    Shapes: clips (n, T, 3, H, W) in [-1, 1]
    """
    device, frame = next(model.parameters()).device, torch.arange(clips.shape[1]).float()
    seen = degrade(clips, model.cfg.degrade)                                        # (n, T, 3, H, W)
    share = max(1, model.cfg.batch // (WORLD * model.cfg.grad_accum))               # as many as a training pass holds
    recon = torch.cat([model.decode(model.encode(c.to(device))[0], frame.to(device)).cpu() for c in seen.split(share)])
    rows = dict(original=clips, seen=seen, reconstruction=recon)
    rows["difference"] = (recon - clips).abs().sub(1)                               # black where they agree
    if model.cfg.degrade == "none":
        del rows["seen"]
    with writing(picture):
        columns = min(8, len(clips))
        labels = [name for name in rows for _ in range(columns)]
        save_video(picture, tile(torch.cat([row[:columns] for row in rows.values()]), columns, labels))
    return [float(psnr_from_mse((x - clips).square().mean((2, 3, 4))).mean()) for x in (recon, seen)]


def train(cfg):
    """Train stage 1; write out/ckpt.pt, out/best.pt, out/log.jsonl and pictures. Returns the checkpoint's path."""
    device, path, mine = pick_device(), Path(cfg.out) / "ckpt.pt", my_share(cfg)
    if cfg.muon and not hasattr(torch.optim, "Muon"):
        raise SystemExit(f"--muon needs torch 2.9, this is {torch.__version__}; install that or give --no-muon")
    ckpt = resume_or_start(cfg, device, MADE_BY)
    with first_rank_first():
        clips, held_out = build_dataset(cfg), build_dataset(cfg, held_out=True)
        if cfg.lpips_weight:
            perceptual = load_lpips(cfg.lpips_net, device)
    if cfg.overfit:
        clips, held_out = OneClip(clips), []
    name, source = ("psnr_held_out", held_out) if len(held_out) else ("psnr_train", clips)
    shown = np.random.default_rng(0).permutation(len(source))[:64]
    eval_clips = torch.stack([source[int(i), 0][0] for i in shown])                 # (n, T, 3, H, W)

    torch.manual_seed(cfg.seed)
    model = NeRVVAE(cfg).to(device)
    ema = NeRVVAE(cfg).to(device).eval().requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    # Muon's steps, scaled to AdamW's size, share its learning rate. They turn all directions of a matrix equally fast.
    matrices = [p for p in model.encoder.parameters() if cfg.muon and p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    opt = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw") if cfg.muon else None
    state = dict(model=model, ema=ema, opt=opt, **(dict(muon=muon) if muon else {}))
    if cfg.gan_weight:
        critic = Discriminator(cfg).to(device)
        opt_d = torch.optim.AdamW(critic.parameters(), betas=(0.0, 0.99), weight_decay=0.0, fused=True)    # MAGVIT's
        state.update(critic=critic, opt_d=opt_d)
    step, best = 0, -math.inf
    if ckpt:
        step, best = ckpt["step"], ckpt["best"]
        for key, thing in state.items():
            thing.load_state_dict(ckpt[key])
        ckpt = None                                     # it lies on the GPU; model and ema have copied their parts
    all_at_one_step(step, path)
    # Of static shapes, as k has two values at most. We go on saving `model`.
    forward = torch.compile(model, dynamic=False) if cfg.compile and device.type == "cuda" else model
    amp = torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16 and device.type == "cuda")

    def save(path):
        return save_checkpoint(path, dict(step=step, best=best, config=dataclasses.asdict(cfg), classes=clips.classes,
                                          made_by=MADE_BY, **{key: thing.state_dict() for key, thing in state.items()}))

    size = sum(p.numel() for p in model.encoder.parameters()), sum(p.numel() for p in model.decoder.parameters())
    if not RANK:
        print(f"stage 1 on {device}{f' and {WORLD - 1} more' * (WORLD > 1)}: {len(clips)} videos, encoder "
              f"{size[0] / 1e6:.2f}M, decoder {size[1] / 1e6:.2f}M parameters, {cfg.tokens} tokens of {cfg.token_dim}")
    bar = tqdm(total=cfg.steps, initial=step, desc="stage 1", unit="step", smoothing=0.05, disable=RANK > 0)
    since, shown_at, stop, saved = time.perf_counter(), step, listen_for_stop(), True
    bad, bad_d = torch.zeros(2, 2, device=device)                                   # skipped steps: all, in a row
    for video, _ in batches(clips, cfg, step):
        torch.manual_seed(cfg.seed * 1_000_003 + step)                              # all noise of step s from (seed, s)
        video = video.to(device, non_blocking=True)                                 # (B, T, 3, H, W), B of this rank
        noise = torch.randn(cfg.batch, cfg.tokens, cfg.token_dim, device=device)[mine]              # (B, N, d)
        gan, terms, pairs = cfg.gan_weight and step >= cfg.gan_start, {}, []
        k = cfg.frames if gan else cfg.frames_per_step or cfg.frames                # the critic looks at whole clips
        frame = torch.randperm(cfg.frames, device=device)[:k].sort()[0]             # (k,)
        for group in opt.param_groups + (muon.param_groups if muon else []):
            group["lr"] = learning_rate(step, cfg)
        model.zero_grad(set_to_none=True)
        for clip, eps in zip(video.chunk(cfg.grad_accum), noise.chunk(cfg.grad_accum)):
            # 1. Encode, sample the tokens, decode k frames.
            with amp:
                recon, mean, logvar = forward(degrade(clip, cfg.degrade), frame.float(), eps)
            recon, target = recon.float(), clip[:, frame]                           # (B, k, 3, H, W) each
            # 2. Eq. 1: look like the video, to the eye and to the critic, with tokens close to N(0, 1).
            mse, kl = F.mse_loss(recon, target), kl_divergence(mean, logvar)        # scalar, (B, N, d)
            loss = mse + cfg.kl_weight * kl.sum((1, 2)).mean()
            if cfg.edge_weight:
                edge = edge_error(recon, target)
                loss = loss + cfg.edge_weight * edge
                add_up(terms, cfg.grad_accum, edge=edge)
            with amp:
                if cfg.lpips_weight and step >= cfg.lpips_start:
                    # Enlarged to 64 where smaller: at 32 its last maps are 1 pixel, and a grid comes out (choice).
                    pair = [F.interpolate(x.flatten(0, 1), max(64, cfg.resolution), mode="bilinear")
                            for x in (recon, target)]                               # (B*k, 3, 64 or H, 64 or W) each
                    close = perceptual(*pair).float().mean()
                    loss = loss + cfg.lpips_weight * close
                    add_up(terms, cfg.grad_accum, lpips=close)
                if gan:
                    critic.requires_grad_(False)
                    fooled = F.softplus(-critic(recon.transpose(1, 2)).float()).mean()
                    loss = loss + cfg.gan_weight * fooled
                    add_up(terms, cfg.grad_accum, gan=fooled)
            (loss / cfg.grad_accum).backward()
            add_up(terms, cfg.grad_accum, loss=loss, mse=mse, kl_per_dim=kl.mean(), token_std=mean.std(),
                   posterior_std=(logvar / 2).exp().mean())
            pairs.append((target.transpose(1, 2), recon.detach().transpose(1, 2)))  # (B, 3, k, H, W) each
        # 3. One optimizer step, then the averaged weights follow.
        add_up(terms, 1, grad_norm=guarded_step(opt, model, cfg.clip, bad, muon))
        update_ema(ema, model, cfg.ema, step)
        # 4. Every few steps the critic learns to tell the two apart.
        if gan and (step + 1) % cfg.gan_every == 0:                                 # logged steps among them
            critic.requires_grad_(True)
            r1 = cfg.r1_weight * 16 if step // cfg.gan_every % 16 == 0 else 0       # lazily, 16 times as strong
            opt_d.zero_grad(set_to_none=True)
            for real, fake in pairs:
                with amp:
                    loss_d, d_real, d_fake = critic_loss(critic, real, fake, r1)
                (loss_d / cfg.grad_accum).backward()
                add_up(terms, cfg.grad_accum, d_real=d_real, d_fake=d_fake)
            for group in opt_d.param_groups:
                group["lr"] = cfg.gan_lr_ratio * learning_rate(step, cfg)
            guarded_step(opt_d, critic, math.inf, bad_d)
        step += 1
        bar.update()

        if step % cfg.log_every == 0 or step % cfg.eval_every == 0 or step == cfg.steps:
            row = dict(step=step, **mean_over_ranks(terms), skipped=int(bad[0] + bad_d[0]),
                       lr=opt.param_groups[0]["lr"],
                       clips_per_s=cfg.batch * (step - shown_at) / (time.perf_counter() - since))
            row["psnr"] = float(psnr_from_mse(row["mse"]))
            if max(bad[1], bad_d[1]) >= 10:
                names = names_of(clips, batch_keys(clips, cfg, step - 1))
                raise SystemExit(not_finite(row, max(bad[1], bad_d[1]), names))
            if step % cfg.eval_every == 0 or step == cfg.steps:
                measure_batchnorm(ema, clips, cfg, device)
                saved = save(path)                      # before anything that could still go wrong
                if not RANK:
                    row[name], psnr_in = evaluate(ema, eval_clips, path.with_name(f"step_{step:06d}.gif"))
                    bar.write(f"step {step}: {name} {row[name]:.2f} dB, KL {row['kl_per_dim']:.2f} nats a channel")
                    if cfg.degrade != "none":
                        row["psnr_in"] = psnr_in
                        bar.write(f"step {step}: psnr_in {psnr_in:.2f} dB, of the {cfg.degrade} clips that went in")
                    if row[name] > best:
                        best = row[name]
                        save(path.with_name("best.pt"))
                        saved = save(path)              # again: a run that goes on must know what to beat
            bar.set_postfix(psnr=f"{row['psnr']:.1f}dB", kl=f"{row['kl_per_dim']:.2f}")
            write_log(path.with_name("log.jsonl"), row)
            since, shown_at = time.perf_counter(), step
        heard = agree(stop[0] if stop else 0)
        if heard:
            save(path)                                  # at once, as whoever sent the signal may not wait
            measure_batchnorm(ema, clips, cfg, device)
            saved = save(path)
            bar.close()
            leave(step, path, heard, saved)
    bar.close()
    if not saved:
        raise SystemExit(f"the last save of {path} failed: make room and give the same command again")
    return path


def load_vae(path, device):
    """The trained tokenizer: averaged weights, frozen, in evaluation mode, with .cfg, .classes and .step."""
    ckpt = load_checkpoint(path, device, MADE_BY)
    model = NeRVVAE(Config(**ckpt["config"])).to(device).eval().requires_grad_(False)
    model.load_state_dict(ckpt["ema"])
    model.classes, model.step = ckpt["classes"], ckpt["step"]
    return model


def main(argv=None):
    """Command line of stage 1. Returns the path of the checkpoint."""
    return train(parse_config(Config, PRESETS, argv))


if __name__ == "__main__":
    main()
