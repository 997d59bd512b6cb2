"""Stage 1: a VAE whose latent code is the weights of a small video network.

    video (B, T, 3, H, W) -> patches (B, P, patch values) -> ViT over [patches ; N queries] -> keep the N queries
      -> BatchNorm -> linear -> mean, logvar (B, N, d) -> z = mean + sigma * noise, the weight tokens
      -> GenerativeNeRV(z, frame) -> video (B, T, 3, H, W)

    python nerv_vae.py                                              # toy clips, a laptop, a few minutes
    python nerv_vae.py --dataset ucf --data-root UCF-101 --out out/ucf      # the paper's run (S; --model B, L)
    python nerv_vae.py --dataset folder --data-root my_videos --out out/my  # any tree of videos
    python nerv_vae.py --dataset nerv_enc --data-root k400 --out out/enc    # the paper's forerunner, NeRV-Enc
    torchrun --nproc_per_node=8 nerv_vae.py --dataset ucf ...               # --batch is what all do together

It writes out/vae/: ckpt.pt (all that stage 2 and sample.py need), log.jsonl (a line every log step), step_XXXXXX.gif
(held-out clips over their reconstructions over the difference) and index.html, the page of the run. The same command
again continues where it stopped.

Letters: B videos, T frames, k of them decoded in a step, H = W pixels, P patches, N weight tokens, d channels a token.
Ranges:  pixels are in [-1, 1]; tokens are roughly N(0, 1), as the KL term pulls them there; `frame` is 0..T-1.
"""
import io
import json
import math
import signal
import time
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather
from torch.utils.checkpoint import checkpoint

from data import (build_dataset, carry_on, claim, degrade, file_hash, first_line, load_lpips,
                  parse_config, progress, psnr, ranks, save_video, say, tile, told, write_file,
                  write_page)
from generative_nerv import GenerativeNeRV, sinusoids


@dataclass(frozen=True)
class Config:
    """Settings of stage 1; the defaults are the toy preset. Paper: A.1, A.2, Table A1; the rest is choice."""

    # data
    dataset: str = "toy"            # toy|ucf|ucf256|k600|folder|laptop|workstation|nerv_enc: clips, row of presets
    data_root: str = ""             # folder of videos, one sub-folder a class (not needed for toy)
    split: str = "all"              # all, train, test or a list of groups such as 1-19,23: the videos that train
    frames: int = 8                 # 1..: T, frames of a clip (paper: 16)
    stride: int = 1                 # 0..: step in the file between frames of a clip; 0 spreads them over the file
    resolution: int = 32            # 8..: H = W in pixels (paper: 128 and 256)
    flip: bool = False              # mirror half of the clips (choice: real footage, as LARP)
    in_memory: bool = False         # decode every video once and keep it, small, on the device
    degrade: str = "none"           # none|downsample|blur|inpaint: damage to what the encoder sees (NeRV-Enc Table 8)
    workers: int = 0                # 0..: loader processes of each rank; 0: none
    # weight tokens and decoder
    model: str = "16"               # decoder width D: S, B, L (128, 256, 512; A.2) or a number; nerv_dec: NeRV-Enc's
    tokens: int = 32                # 1..: N, weight tokens (paper: 128, and 160 at 256 x 256)
    token_dim: int = 32             # 1..: d, channels of a weight token (paper: 128)
    gen_channels: int = 8           # 1..: side of the block that tokens write (paper: 64)
    pe_size: int = 8                # 1..: side of the positional input (Table 2c: 8 is best)
    parameterization: str = "channel"   # channel|fmm|repeat: how tokens enter kernels (Table 2a)
    reuse: str = "heads"            # heads|direct|none: how layers share tokens (Table 2b)
    upsample: str = "transposed"    # transposed|pixelshuffle|bilinear: x2 (paper Table 2d)
    side: str = "residual"          # residual|skip|none: side connections (paper Table 2e)
    kernel_init: float = 0.1        # 0.001..: std of shared kernels at the start, and scale of what tokens write (choice)
    layer_tokens: str = ""          # tokens x channels of each layer: 4x256,0x0; empty: all read all (NeRV-Enc A.5)
    expand: str = "in"              # in|out|taps: with repeat, along which side numbers repeat (NeRV-Enc B c)
    normalize: bool = True          # with repeat, divide every kernel by its norm (NeRV-Enc B a)
    conv_init: bool = True          # with repeat, kernels start normal; off: as signs (NeRV-Enc B b: choice)
    # encoder
    enc_depth: int = 2              # 1..: transformer blocks (paper: 18)
    enc_heads: int = 4              # 1..: attention heads (paper: 14)
    enc_dim: int = 128              # 6..: width of the transformer (paper: 896)
    patch: int = 8                  # 1..: patch height and width in pixels (paper: 8)
    patch_frames: int = 2           # 1..: patch depth in frames (paper: 1)
    logvar_start: float = -5.0      # -30..20: log-variance at the start: narrow, so tokens carry signal
    # losses (paper Eq. 1)
    kl_weight: float = 1e-6         # 0..: times the KL, summed, in nats (paper A.1: 1e-5)
    edge_weight: float = 0.0        # 0..: times the error of edges (departs: not in Eq. 1)
    lpips_weight: float = 0.0       # 0..: perceptual loss (paper: 1); 0 downloads nothing
    lpips_start: int = 0            # 0..: first step of the perceptual loss (paper: 0)
    lpips_net: str = "vgg"          # vgg|alex|squeeze: network of the perceptual loss (choice: vgg as LARP)
    gan_weight: float = 0.0         # 0..: adversarial loss (paper A.1: 1)
    gan_channels: int = 64          # 1..: width of the discriminator's first layer (paper A.1: 64)
    gan_start: int = 0              # 0..: its first step (choice: 100,000 of the paper's 2M)
    gan_every: int = 5              # 1..: the discriminator learns every so many steps (paper A.1)
    gan_lr_ratio: float = 0.2       # 0..: its learning rate, relative (paper A.1: one fifth)
    # optimisation
    batch: int = 8                  # 1..: B, clips per step (paper E.17: 32)
    steps: int = 4000               # 1..: optimizer steps (paper A.1: 2M)
    lr: float = 2e-3                # 0..: peak learning rate (paper A.1: 1e-4)
    muon: bool = True               # Muon for all matrices and kernels (departs: A.1's AdamW)
    warmup: int = 100               # 0..: steps of linear warmup before the cosine (paper A.1; length: choice)
    ema: float = 0.999              # 0..1: decay of the averaged weights that everything after training uses (choice)
    frames_per_step: int = 2        # 0..: frames decoded in a step; 0: all, as with GAN
    grad_accum: int = 1             # 1..: passes that share an optimizer step: less memory
    # run
    bf16: bool = False              # bfloat16 autocast on CUDA
    compile: bool = False           # torch.compile on CUDA: a slow first step, then faster ones
    checkpointing: bool = False     # recompute activations in the backward pass: less memory
    overfit: bool = False           # train on one clip only, and show how close it gets
    log_every: int = 50             # 1..: steps between lines of log.jsonl
    eval_every: int = 1000          # 1..: steps between held-out PSNR, pictures and checkpoints
    out: str = "out/vae"            # folder of the run
    seed: int = 0                   # 0..4294967295: fixes initial weights, clips and noise
    resume: bool = True             # continue from out/ckpt.pt; --no-resume starts over, the old one is ckpt.old.pt


PAPER = dict(
    frames=16, resolution=128, flip=True, workers=8, model="S", tokens=128, token_dim=128,
    gen_channels=64, kernel_init=1.0, enc_depth=18, enc_heads=14, enc_dim=896, patch_frames=1,
    kl_weight=1e-5, lpips_weight=1.0, gan_weight=1.0, gan_start=100_000, batch=32, steps=2_000_000,
    lr=1e-4, muon=False, warmup=10_000, ema=0.9999, frames_per_step=0, bf16=True, compile=True,
    eval_every=10_000)
# 80 inputs and outputs: each of 160 tokens then writes a whole share of every block but the stem's and toRGB's
# (choice: a reading of E.3's "simple alignment").
PAPER_256 = {**PAPER, "resolution": 256, "tokens": 160, "gen_channels": 80, "checkpointing": True}
# No VAE: the posterior is so narrow that tokens are their means. Table 7: 150 epochs of 10k videos. Choice: 6 blocks
# and 12 heads, 46.8M where A.2 has 47.6M; the MLP is 4 times as wide, 2880 (A.5: 2800); warmup.
NERV_ENC = {
    **PAPER, "frames": 8, "stride": 0, "resolution": 256, "flip": False, "model": "nerv_dec",
    "pe_size": 1, "tokens": 196, "token_dim": 288, "layer_tokens": "4x256,128x144,64x288,0x0",
    "parameterization": "repeat", "side": "none", "enc_depth": 6, "enc_heads": 12, "enc_dim": 720,
    "patch": 64, "logvar_start": -30.0, "kl_weight": 0.0, "lpips_weight": 0.0, "gan_weight": 0.0,
    "steps": 46_875, "warmup": 1000, "eval_every": 2500}
# A folder of real videos at 32 x 32 x 8, on a CPU. LPIPS and GAN come last: a step with them takes six times as long.
LAPTOP = dict(
    stride=2, flip=True, in_memory=True, model="32", gen_channels=16, enc_dim=192, kl_weight=5e-7,
    edge_weight=1.0, lpips_weight=0.2, lpips_start=13_100, lpips_net="squeeze", gan_weight=0.1,
    gan_channels=32, gan_start=13_100, gan_every=1, gan_lr_ratio=3.0, steps=14_000)
# The same at 64 x 64 x 16, minutes on a large GPU; Muon's many small GPU launches take 24 ms of a step there.
WORKSTATION = {
    **LAPTOP, "frames": 16, "stride": 1, "resolution": 64, "model": "S", "tokens": 64,
    "token_dim": 64, "gen_channels": 64, "enc_depth": 6, "enc_heads": 6, "enc_dim": 384,
    "gan_channels": 64, "gan_start": 2125, "gan_lr_ratio": 2.0, "lpips_start": 1000,
    "batch": 32, "steps": 2500, "warmup": 200, "frames_per_step": 4, "bf16": True}
PRESETS = {"toy": {}, "ucf": PAPER, "ucf256": PAPER_256, "k600": PAPER, "folder": PAPER,
           "laptop": LAPTOP, "workstation": WORKSTATION, "nerv_enc": NERV_ENC}
MADE_BY = "python nerv_vae.py"      # stands in the checkpoint
FRAMES_AT_ONCE = 4                  # with --checkpointing the decoder renders so many at a time


# ---------------------------------------------------------------------------------------------- model

class Attention(nn.Module):
    """Multi-head self-attention. Shapes: (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise SystemExit(f"{heads} attention heads do not divide a width of {dim}; change one of "
                             "the two")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))             # (B, L, 3, heads, c)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, heads, L, c) each
        y = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, L, c)
        return self.proj(y.transpose(1, 2).flatten(2))                  # (B, L, dim)


def mlp(dim):
    """The transformer's two-layer perceptron, four times as wide inside. Shapes: (..., dim) -> (..., dim)."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class Block(nn.Module):
    """Pre-norm transformer block of ViT. Shapes: (B, L, dim) -> (B, last, dim): so many at the end; 0 is all L."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim)

    def forward(self, x, last=0):
        x = (x + self.attention(self.norm1(x)))[:, -last:]              # (B, L or last, dim)
        return x + self.mlp(self.norm2(x))


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d whose statistics are taken over the tokens of all ranks. Shapes: (n, dim) -> (n, dim)."""

    def forward(self, x):
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        y = super().forward(of_all_ranks(x))                            # (ranks * n, dim)
        return y.view(-1, *x.shape)[dist.get_rank()]                    # (n, dim)


class NeRVEncoder(nn.Module):
    """The hypernetwork: reads a video as patches and writes the weights of its decoder into N query tokens.

    Shapes:  video (B, T, 3, H, W) -> mean, logvar (B, N, d) each
    Units:   pixels in [-1, 1]; the posterior of a token channel is N(mean, exp(logvar))
    Raises:  SystemExit when patches do not fill the clip
    Source:  paper Sec. 3.1 (queries, BatchNorm, linear bottleneck), A.1 (18 blocks, 14 heads, 896)
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        dim = cfg.enc_dim
        if cfg.frames % cfg.patch_frames or cfg.resolution % cfg.patch:
            raise SystemExit(f"patches of {cfg.patch_frames} x {cfg.patch} x {cfg.patch} do not fill "
                             f"{cfg.frames} frames of {cfg.resolution}; change --patch or --patch-frames")
        self.embed = nn.Linear(3 * cfg.patch_frames * cfg.patch ** 2, dim)
        self.register_buffer("place", patch_positions(cfg), persistent=False)  # (P, dim)
        # Small, or BatchNorm would see the queries' differences and scale those between videos down to nothing.
        self.queries = nn.Parameter(0.02 * torch.randn(cfg.tokens, dim))
        self.blocks = nn.ModuleList(Block(dim, cfg.enc_heads) for _ in range(cfg.enc_depth))
        self.norm = BatchNorm(dim)
        self.bottleneck = nn.Linear(dim, 2 * cfg.token_dim)
        # Every posterior starts equally narrow.
        nn.init.zeros_(self.bottleneck.weight[cfg.token_dim:])
        nn.init.constant_(self.bottleneck.bias[cfg.token_dim:], cfg.logvar_start)

    def forward(self, video):
        x = F.pixel_unshuffle(video, self.cfg.patch)                    # (B, T, 3*p*p, h, w), p = patch
        x = x.unflatten(1, (-1, self.cfg.patch_frames))                 # (B, T/f, f, 3*p*p, h, w)
        x = x.permute(0, 1, 4, 5, 2, 3)                                 # (B, T/f, h, w, f, 3*p*p)
        x = x.flatten(4).flatten(1, 3)                                  # (B, P, f*3*p*p)
        x = self.embed(x) + self.place                                  # (B, P, dim)
        x = torch.cat([x, self.queries.expand(len(x), -1, -1)], 1)      # (B, P+N, dim)
        *blocks, final = self.blocks                    # what the last one makes of patches, nobody reads
        for block in blocks:
            x = recomputed(block, self.cfg, x)                          # (B, P+N, dim)
        x = recomputed(final, self.cfg, x, self.cfg.tokens)             # (B, N, dim): the queries only
        x = self.norm(x.float().flatten(0, 1)).view_as(x)               # statistics over B*N tokens
        mean, logvar = self.bottleneck(x).float().chunk(2, -1)          # (B, N, d) each
        return mean, logvar.clamp(-30, 20)


def recomputed(module, cfg, *inputs):
    """module(*inputs); with --checkpointing the backward pass computes it again, which takes less memory."""
    if cfg.checkpointing:
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


def patch_positions(cfg):
    """Fixed sines and cosines that say where a patch lies in time, height and width. Shapes: -> (P, dim).

    Source: choice: base 10 and amplitude 2, larger than the patch embedding at the start, so that the first step already
            knows where a patch lies; at a transformer's usual 10000 and 1 neighbours look alike and learning starts late
    """
    times = torch.arange(cfg.frames // cfg.patch_frames)
    side = torch.arange(cfg.resolution // cfg.patch)
    axes = torch.cartesian_prod(times, side, side).T                    # (3, P): t, y, x of every patch
    each = cfg.enc_dim // 6 * 2                                         # channels for each of the three
    place = torch.cat([sinusoids(axis, each, base=10.0) for axis in axes], 1)
    return F.pad(2 * place, (0, cfg.enc_dim - 3 * each))                # (P, dim)


class NeRVVAE(nn.Module):
    """Encoder and decoder.

    Shapes: video (B, T, 3, H, W), frame (k,), noise (B, N, d) -> recon (B, k, 3, H, W), mean, logvar (B, N, d) each
    Units:  noise ~ N(0, 1), given from outside, so that it does not depend on how a batch is divided
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = NeRVEncoder(cfg)
        self.decoder = GenerativeNeRV(cfg)

    def forward(self, video, frame, noise):
        mean, logvar = self.encode(video)
        tokens = mean + (logvar / 2).exp() * noise                      # (B, N, d)
        return self.decode(tokens, frame), mean, logvar

    def encode(self, video):
        """Shapes: video (B, T, 3, H, W) in [-1, 1] -> mean, logvar (B, N, d) each; what no layer reads is zero."""
        mean, logvar = self.encoder(video.to(self.decoder.used.device))
        return mean * self.decoder.used, logvar

    @torch.compiler.disable             # a convolution a video: compiling 16 of them takes minutes and gains nothing
    def decode(self, tokens, frame):
        """Shapes: tokens (B, N, d), frame (k,) float -> (B, k, 3, H, W) in [-1, 1].

        No more frames at a time than a clip has, and few with --checkpointing: frames decode alone, so that nothing
        changes but the memory.
        """
        at_once = FRAMES_AT_ONCE if self.cfg.checkpointing else self.cfg.frames
        parts = frame.split(at_once)
        return torch.cat([recomputed(self.decoder, self.cfg, tokens, part) for part in parts], 1)

    def play(self, tokens, frame=None):
        """Videos of any length, one at a time, so that memory stays flat; tokens from any device.

        Shapes: tokens (n, N, d), frame (T,) or None for the trained ones -> (n, T, 3, H, W) in [-1, 1], on the CPU
        """
        if frame is None:
            frame = torch.arange(self.cfg.frames).float()
        device = self.decoder.used.device
        frame = frame.to(device)
        return torch.cat([self.decode(one.to(device), frame).cpu() for one in tokens.split(1)])


class Discriminator(nn.Module):
    """3-D StyleGAN-like critic: five residual blocks, each halving time, height and width.

    Shapes:  video (B, T, 3, H, W) -> (B,) logit, high for real
    Source:  paper Sec. 3.1, A.1 (5 blocks, 64 wide, "multiplier of 2 for each block"). Choice: widths 64 * (2, 4, 4,
             4, 4), which is how MAGVIT's code reads such a line: 15.3M parameters at 16 x 128 x 128; doubling five
             times would need 296M
    """

    def __init__(self, cfg):
        super().__init__()
        c = cfg.gan_channels
        self.stem = conv3d(3, c)
        self.blocks = nn.ModuleList()
        for times in (2, 4, 4, 4, 4):
            wider = times * cfg.gan_channels
            a = conv3d(c, c)
            b = conv3d(c, wider)
            side = nn.Conv3d(c, wider, 1, bias=False)
            self.blocks.append(nn.ModuleDict(dict(a=a, b=b, side=side)))
            c = wider
        self.last = conv3d(wider, wider)
        places = math.ceil(cfg.frames / 32) * math.ceil(cfg.resolution / 32) ** 2
        self.fc = nn.Linear(wider * places, wider)
        self.logit = nn.Linear(wider, 1)

    def forward(self, video):
        x = F.leaky_relu(self.stem(video.transpose(1, 2)), 0.2)         # (B, C, T, H, W)
        for block in self.blocks:
            y = F.leaky_relu(block.a(x), 0.2)
            y = F.leaky_relu(block.b(halve(y)), 0.2)                 # (B, wider, T/2, H/2, W/2)
            x = (y + block.side(halve(x))) / math.sqrt(2)
        x = F.leaky_relu(self.last(x), 0.2).flatten(1)                  # (B, 4C * T/32 * H/32 * W/32)
        x = F.leaky_relu(self.fc(x), 0.2)                               # (B, 4C)
        return self.logit(x)[:, 0]                                      # (B,)


def conv3d(c_in, c_out):
    """A 3 x 3 x 3 convolution that keeps the size."""
    return nn.Conv3d(c_in, c_out, 3, padding=1)


def halve(x):
    """Mean over boxes of 2 x 2 x 2; a side of 1 stays, as 16 frames are 1 after four times."""
    return F.avg_pool3d(x, [min(2, n) for n in x.shape[2:]], ceil_mode=True)


# ---------------------------------------------------------------------------------------------- loss: Eq. 1

def vae_loss(recon, target, mean, logvar, cfg, perceptual=None, critic=None):
    """Eq. 1: |recon - target|^2 + lpips_weight LPIPS + gan_weight GAN + kl_weight KL(posterior || N(0, 1)).

    The small presets add edge_weight times the error of edges.
    Returns {name: scalar}: "loss", the weighted sum, its terms as they are, and numbers to watch.
    Shapes: recon, target (B, k, 3, H, W), mean, logvar (B, N, d) -> scalars
    Source: paper Eq. 1, A.1 (weights). Choice: the squared error is a mean over pixels, the KL a sum over tokens and
            channels: Table A12 makes sense for such a KL only; beside a summed error it would be 786,432 times weaker
    """
    kl = kl_divergence(mean, logvar)                                    # (B, N, d)
    terms = dict(mse=F.mse_loss(recon, target), kl_per_dim=kl.mean())
    loss = terms["mse"] + cfg.kl_weight * kl.sum((1, 2)).mean()
    if cfg.edge_weight:
        terms["edge"] = edge_error(recon, target)
        loss += cfg.edge_weight * terms["edge"]
    if perceptual:
        terms["lpips"] = perceptual_distance(recon, target, perceptual)
        loss += cfg.lpips_weight * terms["lpips"]
    if critic:
        terms["gan"] = generator_loss(critic, recon)
        loss += cfg.gan_weight * terms["gan"]
    return dict(loss=loss, **terms, token_std=mean.std(), posterior_std=(logvar / 2).exp().mean())


def generator_loss(critic, fake):
    """The generator's side: small where the critic takes fakes for real. Shapes: (B, T, 3, H, W) -> scalar.

    Source: choice, here and below (the paper names no GAN loss): non-saturating logistic, as StyleGAN and MAGVIT
    """
    return F.softplus(-critic(fake).float()).mean()


def critic_loss(critic, real, fake):
    """The critic's side: small where it tells the two apart. Shapes: (B, T, 3, H, W) twice -> {name: scalar}."""
    logits = critic(torch.cat([real, fake.detach()])).float()           # (2B,)
    d_real, d_fake = logits.chunk(2)                                    # (B,) each
    loss = F.softplus(-d_real).mean() + F.softplus(d_fake).mean()
    return dict(loss_d=loss, d_real=d_real.mean(), d_fake=d_fake.mean())


def kl_divergence(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats of each token channel. Shapes: (B, N, d) twice -> (B, N, d).

    Source: paper Eq. 1 prints the arguments the other way round; departs: this order is the one in every VAE's bound
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def perceptual_distance(recon, target, perceptual):
    """LPIPS, mean over frames. Shapes: recon, target (B, k, 3, H, W) -> scalar.

    Source: paper Eq. 1. Choice: frames below 64 x 64 are enlarged, as at 32 the last maps are 2 x 2 and a grid comes
            out
    """
    size = max(64, recon.shape[-1])
    both = torch.cat([recon, target]).flatten(0, 1)                     # (2*B*k, 3, H, W)
    both = F.interpolate(both, size, mode="bilinear")                   # (2*B*k, 3, size, size)
    return perceptual(*both.chunk(2)).float().mean()


def edge_error(recon, target):
    """Mean squared error of the steps from each pixel to its neighbours, across plus down.

    Shapes: recon, target (..., H, W) in [-1, 1] -> scalar, a squared pixel value like the plain squared error
    Source: departs, presets laptop and workstation only (the paper has no such term): errors of fine detail are
            small, so the plain squared error teaches it last, and a short run ends before
    """
    error = recon - target                                              # (..., H, W)
    return error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()


# ---------------------------------------------------------------------------------------------- training

def learning_rate(step, cfg):
    """Linear warmup to cfg.lr, then a cosine to zero at cfg.steps (paper A.1)."""
    decay = max(0.0, (step - cfg.warmup) / max(cfg.steps - cfg.warmup, 1))
    return cfg.lr * min((step + 1) / max(cfg.warmup, 1), 0.5 * (1 + math.cos(math.pi * decay)))


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """Move averaged weights towards the new ones, faster in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def adamw(parameters, beta1=0.9):
    """Source: paper A.1. Choice: betas, and no decay. Fused: one kernel, and it can skip a step by itself."""
    return torch.optim.AdamW(parameters, betas=(beta1, 0.99), weight_decay=0.0, fused=True)


def optimizers(model, cfg):
    """AdamW; with --muon, Muon for everything that is a matrix, kernels as (c_out, c_in * k * k) among them.

    Source: paper A.1 (AdamW). Departs: Muon, small presets only: it turns all directions of a matrix equally fast, so
            that short runs come further. Its steps are scaled to AdamW's size and share its learning rate
    """
    others = [p for p in model.parameters() if p.ndim != 2 or not cfg.muon]
    opts = [adamw(others)]
    if cfg.muon:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        opts.append(torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return opts


def measure_batchnorm(ema, run, clips):
    """Give the averaged weights BatchNorm statistics of their own, from up to 16 training batches.

    Those of the raw weights do not fit them: on toy clips that mismatch costs 1.3 dB after 1500 steps.
    """
    cfg = run.cfg
    def passes():
        for video in run.batches(clips, range(min(16, cfg.steps))):
            yield from degrade(video, cfg.degrade).chunk(cfg.grad_accum)  # (b, T, 3, H, W) each

    torch.optim.swa_utils.update_bn(passes(), ema.encoder)


def batch_keys(clips, cfg, step):
    """What a step trains on: any videos, each with the seed of a clip. They follow from (seed, step).

    Shapes: -> (B, 2) int: video, seed; with --overfit always the same
    """
    rng = np.random.default_rng([cfg.seed, step])
    keys = rng.integers([len(clips), 2 ** 62], size=(cfg.batch, 2))
    if cfg.overfit:
        keys[:] = 0
    return keys


def train(cfg):
    """Train stage 1; write out/ckpt.pt, out/log.jsonl, pictures and a page. Returns the checkpoint's path."""
    with Run(cfg, MADE_BY) as run:
        perceptual = None
        with run.first_rank_first():
            clips = build_dataset(cfg)
            held_out = build_dataset(cfg, held_out=True)
            if cfg.lpips_weight:
                perceptual = load_lpips(cfg.lpips_net, run.device)
        if cfg.in_memory:
            clips.keep(run.device)

        torch.manual_seed(cfg.seed)
        model = NeRVVAE(cfg).to(run.device)
        ema = NeRVVAE(cfg).to(run.device).eval().requires_grad_(False)
        ema.load_state_dict(model.state_dict())
        opts = optimizers(model, cfg)
        run.keep(opts, model=model, ema=ema)
        forward = run.wrap(model)
        if cfg.gan_weight:
            critic = Discriminator(cfg).to(run.device)
            opt_d = adamw(critic.parameters(), beta1=0.0)
            run.keep([opt_d], critic=critic)
            critic_forward = run.wrap(critic, compiled=False)
            critic.requires_grad_(False)                # but where it learns
        run.resume(classes=clips.classes, videos=len(clips))
        names = clips.files or range(len(clips))
        run.start(f"{len(clips)} videos, encoder {size_of(model.encoder)}, decoder "
                  f"{size_of(model.decoder)}, {cfg.tokens} tokens of {cfg.token_dim}")

        for video in run.batches(clips, range(run.step, cfg.steps)):    # (B, T, 3, H, W), this rank's
            step = run.step
            run.seed_step()
            gan = cfg.gan_weight > 0 and step >= cfg.gan_start
            critic_learns = gan and (step + 1) % cfg.gan_every == 0
            k = cfg.frames
            if cfg.frames_per_step and not gan:         # the critic looks at whole clips
                k = cfg.frames_per_step
            noise = torch.randn(cfg.batch, cfg.tokens, cfg.token_dim, device=run.device)
            frame = torch.randperm(cfg.frames, device=run.device)[:k].sort()[0]  # (k,)
            for clip, part in zip(video.chunk(cfg.grad_accum), run.passes):
                with run.autocast():
                    # 1. Encode, draw the tokens, decode k frames.
                    recon, mean, logvar = forward(degrade(clip, cfg.degrade), frame.float(), noise[part])
                    recon = recon.float()                               # (B, k, 3, H, W)
                    target = clip[:, frame]
                    # 2. Eq. 1: look like the video, to the eye and to the critic, with tokens close to N(0, 1).
                    terms = vae_loss(recon, target, mean, logvar, cfg,
                                     perceptual if step >= cfg.lpips_start else None,
                                     critic if gan else None)
                (terms["loss"] / cfg.grad_accum).backward()
                run.add(terms)
                # 3. Every few steps the critic learns to tell the two apart.
                if critic_learns:
                    critic.requires_grad_(True)
                    with run.autocast():
                        terms = critic_loss(critic_forward, target, recon)
                    (terms["loss_d"] / cfg.grad_accum).backward()
                    critic.requires_grad_(False)
                    run.add(terms)
            # 4. One optimizer step, then the averaged weights follow.
            rate = learning_rate(step, cfg)
            run.add(run.update(model, opts, rate))
            update_ema(ema, model, cfg.ema, step)
            if critic_learns:
                run.update(critic, [opt_d], cfg.gan_lr_ratio * rate, limit=math.inf)
            # 5. Log; now and then save and draw a picture; stop if a signal asks for it.
            run.finish_step()
            if run.time_to_save:
                measure_batchnorm(ema, run, clips)
                run.save()
            if run.time_to_log:
                row = run.means([names[i] for i, _ in batch_keys(clips, cfg, step)])
                row["psnr"] = -10 * math.log10(row["mse"] / 4 + 1e-12)
                if run.time_to_look and run.rank == 0:
                    row.update(judge(ema, clips, held_out, run))
                run.log(row)
            run.leave_if_asked()
    return run.path


def load_vae(path, device):
    """The trained tokenizer, as `load_model` says."""
    return load_model(path, device, MADE_BY, lambda ckpt: NeRVVAE(Config(**ckpt["config"])))


def main(argv=None):
    """Command line of stage 1. Returns the path of the checkpoint."""
    return train(parse_config(Config, PRESETS, argv))


# ==================================================================================================
# The method ends here. Below: the picture of a run, checkpoints, and `Run`, what both stages need.

@torch.compiler.disable
def of_all_ranks(x):
    """The rows of all ranks; gradients come back. (torch's SyncBatchNorm refuses CPUs.)"""
    return torch.cat(all_gather(x))


def judge(model, clips, held_out, run):
    """PSNR in dB of at most 64 held-out clips through their mean tokens; of training clips where all train.

    The picture has rows of originals, reconstructions, differences, and of what the encoder saw, if damaged.
    Returns {"psnr_held_out" or "psnr_train": mean over frames, then clips; "psnr_in": that of damaged clips}
    """
    name = "psnr_held_out"
    if run.cfg.overfit or not len(held_out):
        name = "psnr_train"
        held_out = clips
    chosen = np.random.default_rng(0).permutation(len(held_out))[:64]
    if run.cfg.overfit:
        chosen = [0]
    clips = torch.stack([held_out[i, 0][0] for i in chosen]).cpu()      # (n, T, 3, H, W)
    seen = degrade(clips, run.cfg.degrade)                              # (n, T, 3, H, W)
    # One at a time, as a training pass may hold no more.
    means = [model.encode(clip)[0] for clip in seen.split(1)]           # (1, N, d) each
    recon = model.play(torch.cat(means))                                # (n, T, 3, H, W)
    found = {name: psnr(recon, clips).mean().item()}
    rows = {"original": clips, "reconstruction": recon, "difference": (recon - clips).abs() - 1}
    if run.cfg.degrade != "none":
        rows["seen"] = seen
        found["psnr_in"] = psnr(seen, clips).mean().item()
    columns = min(8, len(clips))
    labels = list(np.repeat(list(rows), columns))
    picture = tile(torch.cat([row[:columns] for row in rows.values()]), columns, labels)
    with carry_on(run.picture):
        save_video(run.picture, picture)
    return found


def size_of(module):
    """Parameters in millions, as text."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M"


# ------------------------------------------------------------------------------------------ checkpoints

FORMAT = 2              # counts changes of what the numbers in a checkpoint mean


def save_checkpoint(path, state):
    """Write a dict of tensors and plain Python, all or nothing.

    Raises: SystemExit in one line where the disk is full or cannot be written
    """
    blob = io.BytesIO()
    torch.save({**state, "format": FORMAT}, blob)
    write_file(path, blob.getbuffer())


def load_checkpoint(path, device, made_by):
    """The dict that save_checkpoint wrote. No code in the file is run, no size in it is believed.

    Raises: SystemExit naming the command `made_by` where there is no file, or what is wrong with it
    """
    if not Path(path).is_file():
        raise SystemExit(f"no checkpoint at {path}; name one that is elsewhere (--vae, --dit), or "
                         f"make it with: {made_by}")
    with told(f"{path} cannot be read, is damaged or no checkpoint of ours"):
        with zipfile.ZipFile(path) as archive:
            packed = any(member.compress_type for member in archive.infolist())     # ours never are
            if packed or archive.testzip():             # every member's checksum
                raise ValueError("its checksums do not agree with its contents")
        ckpt = torch.load(path, map_location=device, weights_only=True)
        found = f"{ckpt['made_by']}, format {ckpt.get('format', 1)}"
    if found != f"{made_by}, format {FORMAT}":
        raise SystemExit(f"{path} was made by {found}, and what is needed is by {made_by}, format "
                         f"{FORMAT}: name another, or make it again with --no-resume")
    return ckpt


def load_model(path, device, made_by, build):
    """The averaged weights of a checkpoint in the network that build(checkpoint) makes, frozen.

    It has .cfg, .class_names, .step, .path and .sha256.
    """
    ckpt = load_checkpoint(path, device, made_by)
    with told(f"{path} does not fit this revision; use the one that made it"):
        model = build(ckpt)
        model.load_state_dict(ckpt["ema"])
    model.to(device).eval().requires_grad_(False)
    model.class_names = ckpt["classes"]
    model.step = ckpt["step"]
    model.path = Path(path)
    model.sha256 = file_hash(path)
    return model


# ------------------------------------------------------------------------------------------ what a run needs

# A run may go on with other values of these (--steps only moves where its schedule ends); another
# change would silently make it another experiment.
HARMLESS = {"steps", "log_every", "eval_every", "out", "resume", "workers", "in_memory", "compile",
            "checkpointing", "data_root", "sampler", "sample_steps", "guidance", "vae"}
STOPS = (signal.SIGINT, signal.SIGTERM)


def pick_device():
    """This rank's device. Denormal numbers are flushed to zero, as they are slow."""
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks()[0] % torch.cuda.device_count())


class Run(ExitStack):
    """What both stages need around their method: device, ranks, folder, checkpoint, log, signals.

    It knows nothing of networks and losses; `train` knows nothing of how files are written or ranks
    talk. The order of calls: keep, resume, start; then for every step add, update, finish_step, and
    where it is time save, means and log; leave_if_asked. What it holds (the other ranks, the folder's
    lock, the bar, signal handlers) it gives back when it is left, the last first.
    """

    def __init__(self, cfg, made_by):
        super().__init__()
        self.cfg = cfg
        self.made_by = made_by
        self.rank, self.world = ranks()
        self.device = pick_device()
        self.cuda = self.device.type == "cuda"
        self.out = Path(cfg.out)
        self.path = self.out / "ckpt.pt"
        if cfg.batch % (self.world * cfg.grad_accum):
            raise SystemExit(f"--batch {cfg.batch} does not divide into {self.world} processes times "
                             f"--grad-accum {cfg.grad_accum}; it is what all do together in a step")
        rows = np.arange(cfg.batch).reshape(cfg.grad_accum, self.world, -1)
        self.rows = rows[:, self.rank]                  # (passes, clips of a pass), this rank's
        self.passes = [slice(row[0], row[-1] + 1) for row in self.rows]
        self.step = 0
        self.networks = {}
        self.opts = []
        self.terms = {}                                 # name -> values since the last line
        self.bad = {}                                   # network -> skipped steps in a row
        self.heard = 0                                  # the last signal
        self.bar = None
        if self.rank == 0:
            self.enter_context(claim(self.out))
        with suppress(ValueError):                      # a thread may not have handlers
            for number in STOPS:
                self.callback(signal.signal, number, signal.signal(number, self.note_signal))
        if self.world > 1:
            self.join_ranks()

    # ---- several processes

    def join_ranks(self):
        backend = "gloo"
        if self.cuda:
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        say(f"rank {self.rank} waits for all {self.world} processes that WORLD_SIZE names")
        # Rank 0 may scan a folder for hours while others wait; a dead rank is torchrun's to notice.
        with told("the other processes are not there; unset RANK and WORLD_SIZE to run alone"):
            dist.init_process_group(backend, timeout=timedelta(days=1))
        self.callback(time.sleep, 0.5)                  # or a thread of gloo aborts Python's shutdown
        self.callback(dist.destroy_process_group)

    def agree(self, numbers, how=dist.ReduceOp.MAX):
        """The largest of all ranks' numbers (or of each in a list); all wait until all are here."""
        value = torch.as_tensor(numbers)
        if self.world > 1:
            dist.all_reduce(value, how)
        return value.tolist()

    @contextmanager
    def first_rank_first(self):
        """What rank 0 does in here (scan a folder, download weights) the others then find done."""
        if self.rank:
            self.agree(0)
        yield
        if not self.rank:
            self.agree(0)

    def wrap(self, model, compiled=True):
        """The same weights, compiled and with gradients averaged over ranks; `model` is saved."""
        if compiled and self.cfg.compile and self.cuda and can_compile(self.device):
            model = torch.compile(model, dynamic=False)
        if self.world > 1:
            model = nn.parallel.DistributedDataParallel(model)
        return model

    def autocast(self):
        """bfloat16 where --bf16 asks for it and a GPU computes."""
        return torch.autocast(self.device.type, torch.bfloat16, self.cfg.bf16 and self.cuda)

    # ---- checkpoint

    def keep(self, opts, **networks):
        """What a checkpoint holds of training."""
        self.opts += opts
        self.networks.update(networks)

    def resume(self, **facts):
        """Load the checkpoint of out, where there is one. `facts` go into every checkpoint.

        Raises: SystemExit where it would become another experiment: other settings, other facts
        """
        self.facts = facts
        if self.cfg.resume and self.path.exists():
            ckpt = load_checkpoint(self.path, self.device, self.made_by)
            now = {**asdict(self.cfg), **facts}
            was = {**now, **ckpt, **ckpt["config"]}
            differ = [f"{name} {was[name]} (now {now[name]})" for name in now
                      if name not in HARMLESS and was[name] != now[name]]
            if differ:
                raise SystemExit(f"{self.path} was trained with {', '.join(differ)}; use those, "
                                 "another --out, or --no-resume")
            for name, network in self.networks.items():
                network.load_state_dict(ckpt[name])
            for opt, state in zip(self.opts, ckpt["opts"]):
                opt.load_state_dict(state)
            self.step = ckpt["step"]
        if self.agree(self.step) != self.step:
            raise SystemExit(f"rank {self.rank} found {self.path} at step {self.step}, others found "
                             "a later one; --out must be one folder for all")

    def save(self):
        """Write the checkpoint; only rank 0 does. A full disk ends the run only where it ends anyway."""
        if self.rank == 0:
            state = dict(self.facts, step=self.step, made_by=self.made_by, config=asdict(self.cfg),
                         opts=[opt.state_dict() for opt in self.opts])
            for name, network in self.networks.items():
                state[name] = network.state_dict()
            with carry_on(self.path):
                save_checkpoint(self.path, state)
                return
            if self.asked or self.step == self.cfg.steps:
                raise SystemExit(f"stopped at step {self.step}, and the last save of {self.path} "
                                 "failed: make room and give the same command again")

    # ---- steps

    def start(self, what):
        """Say what is trained and show a bar; from here on a signal waits for the end of a step.

        With --no-resume, what an earlier run left becomes ckpt.old.pt and log.old.jsonl
        """
        if self.rank == 0:
            for path in (self.path, self.out / "log.jsonl"):
                if path.exists() and not self.cfg.resume:
                    path.replace(path.with_suffix(f".old{path.suffix}"))
            say(f"{self.made_by} on {self.world} x {self.device.type}: {what}; from step {self.step} "
                f"to {self.cfg.steps} of {self.path}")
        self.bar = self.enter_context(progress(None, self.rank > 0, total=self.cfg.steps,
                                               initial=self.step, desc=self.cfg.out))
        self.since = time.perf_counter()

    def note_signal(self, number, _):
        if self.bar is None or self.heard and number == signal.SIGINT:
            raise SystemExit(128 + number)              # Ctrl-C twice: do not wait for the step
        self.heard = number             # SIGTERM comes twice where a scheduler tells every process

    def batches(self, clips, steps):
        """This rank's share of the batch of each step. Shapes: -> (B, T, 3, H, W) on the device."""
        keys = (batch_keys(clips, self.cfg, step)[self.rows.flat] for step in steps)
        on_disk = not self.cfg.in_memory                # clips on a GPU go to no other process
        loader = torch.utils.data.DataLoader(
            clips, batch_sampler=keys, num_workers=self.cfg.workers if on_disk else 0,
            pin_memory=self.cuda and on_disk, worker_init_fn=ignore_stops)
        for video, _ in loader:
            yield video.to(self.device, non_blocking=True)

    def seed_step(self):
        """Make all noise of this step follow from (seed, step), so that a run that goes on is one."""
        torch.manual_seed(self.cfg.seed * 1_000_003 + self.step)

    def add(self, terms):
        """Add scalars to their means since the last line of the log; nothing waits for the GPU."""
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value.detach().float())

    def update(self, model, opts, lr, limit=1.0):
        """Clip gradients to norm `limit` (choice), then step; skip it where one is not finite.

        AdamW never waits for the GPU: its fused form looks at found_inf itself, as it does for
        torch's gradient scaler. Muon has no such form and waits.
        Returns {"grad_norm": norm, "skipped": 1 or 0}
        """
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        bad = (~norm.isfinite()).float()
        for opt in opts:
            opt.param_groups[0]["lr"] = lr
            opt.found_inf = bad
            if isinstance(opt, torch.optim.AdamW) or not bad:
                opt.step()
        model.zero_grad()
        self.bad[model] = (self.bad.get(model, 0) + 1) * bad
        return dict(grad_norm=norm, skipped=bad)

    def finish_step(self):
        """Count the step, and decide what it is time for."""
        self.step += 1
        self.bar.update()
        self.asked = self.agree(self.heard)
        self.time_to_look = self.step % self.cfg.eval_every == 0 or self.step == self.cfg.steps
        self.time_to_save = self.time_to_look or self.asked
        self.time_to_log = self.time_to_look or self.step % self.cfg.log_every == 0
        self.picture = self.out / f"step_{self.step:06d}.gif"

    def means(self, names):
        """Means since the last line, over ranks too, and clips a second; waits for the GPU.

        Raises: SystemExit after ten skipped steps in a row, with the `names` of what the last one saw
        """
        means = torch.stack([torch.stack(values).mean() for values in self.terms.values()]).cpu()
        means = self.agree(means / self.world, dist.ReduceOp.SUM)
        row = {"step": self.step, **dict(zip(self.terms, means))}
        if max(self.bad.values()) >= 10:
            raise SystemExit("10 steps in a row or more had a loss or gradient that is not a number, "
                             f"and were skipped; stopped at {row}; this batch: "
                             f"{', '.join(map(str, names))}. The checkpoint, if there is one, is "
                             "from before; lower --lr, or look at these")
        seconds = time.perf_counter() - self.since
        row["clips_per_s"] = self.cfg.batch * len(self.terms["grad_norm"]) / seconds
        self.terms = {}
        self.since += seconds
        return row

    def log(self, row):
        """Append a line to log.jsonl, and show its losses and PSNRs; only rank 0 does."""
        if self.rank:
            return
        path = self.out / "log.jsonl"
        with carry_on(path), open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        shown = [name for name in row if name.startswith(("loss", "psnr"))]
        text = ", ".join(f"{name} {row[name]:.4g}" for name in shown)
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            say(f"step {self.step} of {self.cfg.steps}: {text}")
        if self.time_to_look:
            with carry_on(self.out / "index.html"):
                write_page(self.out, self.cfg.out, asdict(self.cfg))

    def leave_if_asked(self):
        """End the run where a signal asked to."""
        if self.asked:
            if self.rank == 0:
                say(f"stopped at step {self.step}; the same command continues {self.path}")
            raise SystemExit(128 + self.asked)


def can_compile(device):
    """Whether torch.compile works here, which needs a C compiler and Python's headers."""
    try:
        torch.compile(torch.square)(torch.ones(1, device=device))
    except Exception as error:                          # one for each part that may be missing
        say(f"torch.compile does not work here ({first_line(error)}): the same, but slower")
        return False
    return True


def ignore_stops(_):
    """A loader ends with its run, not where a scheduler or Ctrl-C signals every process."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
