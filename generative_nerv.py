"""The decoder: weight tokens become the kernels of one small convolutional network per video.

    weight tokens (B, N, d) --a linear head for each layer--> a block of that layer's kernel
                                                              (the rest is shared by all videos)
    frame index t --sines and cosines of time, height, width--> (T, 48, 8, 8)
        -> stem -> [x2, conv, conv] -> ... -> [x2, conv] -> toRGB -> tanh -> (T, 3, H, W)

A video *is* its network: the same tokens render any frame index, between the trained frames and beyond them.

    python generative_nerv.py --model L --resolution 128        # prints Table A1, layer by layer

Letters: B videos, T frames, N weight tokens, d channels of a token, D width of the network, c_in and c_out channels
         of a kernel, k its height and width.
Ranges:  tokens are roughly N(0, 1). `frame` is the frame index of the training grid, a float: 0 is the first trained frame,
         T-1 the last, 0.5 lies between two, T and more lie beyond the end. Pixels are in [-1, 1].
Feature maps are (B*T, c, H, W), the T frames of the first video first. Every video has its own kernels, so a layer
runs one convolution for each video. `cfg` is nerv_vae.Config.
"""
import argparse
import dataclasses
import math
import re
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

NERV_WIDTHS = {"S": 128, "B": 256, "L": 512}            # D (paper A.2)
PE_DIM = 16             # sines and cosines for each of time, height and width (paper A.2)
PE_BASE = 10.0          # the slowest sine is nearly this many times slower than the fastest: choice


# ---------------------------------------------------------------------------------------------- Table A1

class Layer(NamedTuple):
    """One row of Table A1: what a layer does, and which block of its kernel the tokens write."""
    kind: str                   # stem | transposed | conv | rgb; and, in Table 2d, bilinear or shuffle
    c_in: int
    c_out: int
    k: int
    grid: int                   # height and width of the maps that the kernel slides over
    size: int                   # height and width of the output
    gen_in: int                 # the tokens write kernel[:gen_out, :gen_in]
    gen_out: int
    ends_level: bool = False    # the last layer of its size: the residual joins here

    @property
    def numel(self):
        """Numbers in the kernel."""
        return self.c_in * self.c_out * self.k ** 2

    @property
    def generated(self):
        """How many of them the tokens write."""
        return self.gen_in * self.gen_out * self.k ** 2

    @property
    def flops(self):
        """Floating-point operations for one frame, two for each multiply-add."""
        return 2 * self.numel * self.grid ** 2


def layer_plan(cfg):
    """The layers of the decoder, in order.

    Each level doubles the size until the resolution is reached. The last level is 2D wide, and the convolution before
    it widens; at 256 x 256 there is one more level of width D.

    Raises: SystemExit for an unknown model, or when pe_size is not the resolution divided by a power of two
    Source: paper Table A1, Sec. 3.2; its weight shapes are (in, out), so the widening layer's [128, 64, 3, 3] is 128
            inputs and 64 outputs. Choice: the stem is generated whole (the table names two shapes for it); the level
            that E.3 adds for 256 x 256 stands before the last one, as only that gives Table A2's 64.5M at L
    """
    if cfg.model == "nerv_dec":
        return nerv_dec_plan(cfg)
    D = decoder_width(cfg.model)
    g = min(cfg.gen_channels, D)                        # 64 in the paper
    levels = count_doublings(cfg)
    widths = [D] * (levels - 1) + [2 * D]

    size = cfg.pe_size
    plan = [Layer("stem", 3 * PE_DIM, widths[0], 3, size, size, 3 * PE_DIM, widths[0])]
    for width, following in zip(widths, widths[1:] + [None]):
        grid = size
        size = 2 * size
        last = following is None                        # the last level has one convolution less
        plan.append(Layer("transposed", width, width, 4, grid, size, g, g))
        plan.append(Layer("conv", width, width, 3, size, size, g, g, ends_level=last))
        if not last:
            gen_in = min(following // width * g, D)     # 2g where the outputs double, as the table
            plan.append(Layer("conv", width, following, 3, size, size, gen_in, g, ends_level=True))
    plan.append(Layer("rgb", 2 * D, 3, 3, size, size, D, 3))  # D of 2D inputs, as the table

    if cfg.upsample != "transposed" or cfg.side == "skip":
        return ablated_plan(plan, cfg)                  # Tables 2d, 2e
    return plan


def decoder_width(model):
    """D of a model: S, B, L or a number. Raises SystemExit for any other."""
    if model in NERV_WIDTHS:
        return NERV_WIDTHS[model]
    if re.fullmatch("[1-9][0-9]*", model):
        return int(model)
    raise SystemExit(f"--model {model} is not S, B, L, nerv_dec or a number of channels")


def count_doublings(cfg):
    """How often pe_size is doubled to reach the resolution. Raises SystemExit where it never does."""
    levels = (cfg.resolution // cfg.pe_size).bit_length() - 1
    if levels < 1 or cfg.pe_size << levels != cfg.resolution:
        raise SystemExit(f"resolution {cfg.resolution} is not pe_size {cfg.pe_size} times 2, 4, 8, "
                         "...; change --resolution or --pe-size")
    return levels


# ---------------------------------------------------------------------------------------------- positions

def sinusoids(position, dim, base=10000.0):
    """Sines and cosines of a position at `dim / 2` frequencies, from 1 down to nearly 1 / base radians a unit.

    Shapes:  position (...) -> (..., dim) in [-1, 1]
    Source:  the transformer's embedding; paper A.1 takes "sinusoidal" in place of NeRV's exponential one
    """
    omega = base ** (-torch.arange(dim // 2, device=position.device) / (dim // 2))  # (dim/2,)
    angle = position.float()[..., None] * omega                         # (..., dim/2)
    return torch.cat([angle.sin(), angle.cos()], -1)                    # (..., dim)


def positional_embedding(frame, size):
    """The decoder's only input besides the tokens: where in time and space a cell lies.

    Shapes:  frame (T,) -> (T, 48, size, size) in [-1, 1]
    Units:   `frame` counts training frames and is never divided by T, so fractions and extrapolation keep their
             meaning
    Source:  paper Sec. 3.2, A.2. Choice: the fastest wave of height and width turns by pi from a cell to the next,
             the finest pattern that a grid can hold; that of time turns by 1 a frame, as frames between frames are
             asked for. At 1 a cell, 8 neighbours look so alike that UCF-101 clips lose 0.7 dB after 600 steps. (At pi
             a cell the fastest sine is 0 everywhere and its cosine 1, -1, 1 ..)
    """
    cell = math.pi * torch.arange(size, device=frame.device)
    time = sinusoids(frame, PE_DIM, PE_BASE)[:, :, None, None]          # (T, 16, 1, 1)
    place = sinusoids(cell, PE_DIM, PE_BASE).T                          # (16, size)
    shape = (len(frame), PE_DIM, size, size)
    waves = [time, place[:, :, None], place[:, None, :]]                # time, height, width
    return torch.cat([wave.expand(shape) for wave in waves], 1)         # (T, 48, size, size)


# ---------------------------------------------------------------------------------------------- one layer

class ModulatedConv2d(nn.Module):
    """A convolution whose kernel differs from video to video and is the same for all frames of a video.

    The tokens are part of the kernel: a linear head turns each token into its share of the block
    kernel[:gen_out, :gen_in]. The block is added to a kernel that all videos share. Dividing by the norm over all
    axes but the output channel keeps feature maps at unit scale, whatever was written.

    Shapes:  x (B*T, c_in, H, W), tokens (B, N, d) -> (B*T, c_out, H', W'), twice as large where the layer doubles
    Units:   the output has unit scale where the input is the GELU of something of unit scale
    Source:  paper Sec. 3.1 (channel-wise parameterization; normalisation), E.18 (a head for each layer). Choice: the
             shared kernel lies under the block too, in place of a bias of the head, so that the mean video starts as
             an ordinary convolution (such a start is worth 1.8 dB in NeRV-Enc B)
    """
    rows = slice(None)          # which tokens it reads: all (Table 2b and NeRV-Enc also try other ways)
    columns = None              # how many channels of them: all

    def __init__(self, layer, cfg):
        super().__init__()
        self.layer = layer
        self.shape = (layer.c_out, layer.c_in, layer.k, layer.k)        # of a kernel
        start = torch.randn(layer.c_out, layer.c_in * layer.k ** 2)
        self.shared = nn.Parameter(cfg.kernel_init * start)
        self.bias = nn.Parameter(torch.zeros(layer.c_out))
        self.written = self.count_generated()
        self.per_token = math.ceil(self.written / cfg.tokens)
        self.head = nn.Linear(cfg.token_dim, self.per_token, bias=False)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(cfg.token_dim))
        self.scale = cfg.kernel_init           # what the tokens write is as large as what is shared
        self.gain = unit_gain(layer)

    def count_generated(self):
        """How many numbers the tokens supply to this layer."""
        return self.layer.generated

    def generated(self, tokens):
        """The numbers that the tokens supply; where N does not divide them, the last ones are cut.

        Token n supplies numbers n * per_token to (n + 1) * per_token - 1. Shapes: (B, N, d) -> (B, written)
        """
        tokens = tokens[:, self.rows, :self.columns]
        values = self.head(tokens)[..., :self.per_token]  # a shared head (Table 2b) has more
        return self.scale * values.flatten(1)[:, :self.written]         # (B, written)

    def modulate(self, tokens):
        """The kernel of each video before it is normalised. Shapes: (B, N, d) -> (B, c_out, c_in, k, k)."""
        layer = self.layer
        block = self.generated(tokens).view(-1, layer.gen_out, layer.gen_in, layer.k, layer.k)
        missing = (0, 0, 0, 0, 0, layer.c_in - layer.gen_in, 0, layer.c_out - layer.gen_out)
        return self.shared.view(self.shape) + F.pad(block, missing)     # (B, c_out, c_in, k, k)

    def kernel(self, tokens):
        """The kernel of each video. Shapes: (B, N, d) -> (B, c_out, c_in, k, k)."""
        kernel = self.modulate(tokens)                                  # (B, c_out, c_in, k, k)
        energy = kernel.square().sum((2, 3, 4), keepdim=True)           # (B, c_out, 1, 1, 1)
        return kernel * (energy + 1e-8).rsqrt() * self.gain

    def forward(self, x, tokens):
        outputs = []
        for video, kernel in zip(x.chunk(len(tokens)), self.kernel(tokens)):  # (T, c_in, H, W)
            outputs.append(convolve(video, kernel, self.bias, self.layer))
        return torch.cat(outputs)                                       # (B*T, c_out, H', W')


def unit_gain(layer):
    """What a kernel of norm 1 is multiplied by, so that every feature map starts at unit scale.

    A kernel of norm 1 turns independent inputs of mean square 1 into outputs of mean square 1, if every output pixel
    sees all k x k taps. Two things are different here:
    - Taps. Along one axis, an output of a transposed convolution sees 2 of the 4 taps, at an edge only 1; other
      convolutions see all k, fewer at an edge. With `seen` taps on average along each of the two axes, the mean
      square falls by (seen / k)^2, so the amplitude falls by seen / k.
    - Inputs. Their mean square is 1/2 after sines and cosines (stem), 0.4256 = 1.533^-2 after the GELU of a unit
      normal. toRGB goes on to a tanh and keeps its smaller scale.
    Source: choice (the paper does not say how feature maps keep their scale)
    """
    if layer.kind == "transposed":
        seen = 2 - 1 / layer.grid
    else:
        reach = layer.k // 2               # both edges together hide 2 * (1 + 2 + ... + reach) taps
        seen = layer.k - reach * (reach + 1) / layer.grid
    restore = {"stem": math.sqrt(2), "rgb": 1.0}.get(layer.kind, 1.533)
    return layer.k / seen * restore


def convolve(x, kernel, bias, layer):
    """One video's feature maps through one kernel.

    Shapes:  x (T, c_in, H, W), kernel (c_out, c_in, k, k) -> (T, c_out, H', W'), twice as large where layer doubles
    """
    if layer.kind == "transposed":                # k 4, stride 2, padding 1: exactly twice the size
        return F.conv_transpose2d(x, kernel.transpose(0, 1), bias, stride=2, padding=1)
    if layer.kind == "bilinear":                        # Table 2d
        x = double(x)
    y = F.conv2d(x, kernel, bias, padding=layer.k // 2)
    if layer.grid < layer.size:                         # Table 2d: channels become pixels
        y = F.pixel_shuffle(y, layer.size // layer.grid)
    return y


def double(x):
    """Bilinear interpolation to twice the size. Shapes: (n, c, h, w) -> (n, c, 2h, 2w)."""
    return F.interpolate(x, scale_factor=2, mode="bilinear")


# ---------------------------------------------------------------------------------------------- the decoder

def enlarge(x, channels):
    """The side path around a level: bilinear x2; where the level widens, channels are repeated.

    Shapes:  x (n, c, h, w) -> (n, channels, 2h, 2w)
    Source:  paper Sec. 3.2, A.1 (bilinear, no parameters). Choice: repeated channels
    """
    return double(x).repeat(1, channels // x.shape[1], 1, 1)


def render(layers, convs, x, side):
    """Run the layers on an embedding: the same walk for a batch of videos and for one that is instantiated.

    Shapes:  x (n, 48, h, w) -> (n, 3, H, W) in [-1, 1]; layers and convs go in pairs, convs[i](x) -> y
    Source:  paper Table A1; GELU in all blocks and tanh at the end (A.2); residual sums (Sec. 3.2, A.1). Choice: the
             sum comes after the GELU and is divided by sqrt(2), which roughly keeps the scale, as StyleGAN2
    """
    if side != "residual":
        return render_otherwise(layers, convs, x, side)  # Table 2e's other ways; NeRV-Enc
    x = F.gelu(convs[0](x))                                             # (n, D, h, w)
    entry = x
    for layer, conv in zip(layers[1:-1], convs[1:-1]):
        x = F.gelu(conv(x))                                             # (n, c, size, size)
        if layer.ends_level:
            x = (x + enlarge(entry, layer.c_out)) / math.sqrt(2)
            entry = x
    return convs[-1](x).tanh()                                          # (n, 3, H, W)


class GenerativeNeRV(nn.Module):
    """The video decoder: a batch of weight tokens and frame indices to a batch of videos.

    Shapes:  tokens (B, N, d), frame (T,) float -> (B, T, 3, H, W) in [-1, 1]
    Units:   tokens ~ N(0, 1); frame on the training grid, fractional or beyond the end allowed
    Source:  paper Sec. 3.1-3.2, Table A1
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.layers = layer_plan(cfg)
        if cfg.parameterization == "channel" and cfg.reuse == "heads" and not cfg.layer_tokens:
            self.convs = nn.ModuleList(ModulatedConv2d(layer, cfg) for layer in self.layers)
        else:
            self.convs = ablated_convs(self.layers, cfg)  # Tables 2a, 2b; NeRV-Enc
        used = torch.zeros(cfg.tokens, cfg.token_dim, dtype=torch.bool)  # (N, d): all, but in NeRV-Enc
        for conv in self.convs:
            used[conv.rows, :conv.columns] = True
        self.register_buffer("used", used, persistent=False)

    def forward(self, tokens, frame):
        x = embed(frame, self.layers[0], len(tokens))                  # (B*T, 48, h, w)
        convs = [partial(conv, tokens=tokens) for conv in self.convs]
        video = render(self.layers, convs, x, self.cfg.side)            # (B*T, 3, H, W)
        return video.unflatten(0, (len(tokens), -1))                    # (B, T, 3, H, W)

    def instantiate(self, tokens):
        """One video's tokens turned into a plain CNN, its kernels normalised once: the fast way to play one video.

        Shapes:  tokens (N, d) -> PlainNeRV, frame (T,) -> (T, 3, H, W); equals forward(tokens[None], frame)[0]
        """
        return PlainNeRV(self, tokens)


def embed(frame, stem, videos=1):
    """What the stem reads, the same for every video; NeRV-Dec's reads time alone, 16 channels.

    Channels last in memory: what convolutions are fastest at, on a GPU and on a CPU.
    Shapes: frame (T,) -> (videos*T, 48, h, w), h = w = stem.grid
    """
    x = positional_embedding(frame, stem.grid)[:, :stem.c_in]           # (T, 48, h, w)
    return x.repeat(videos, 1, 1, 1).contiguous(memory_format=torch.channels_last)


class PlainConv2d(nn.Module):
    """A layer with one video's kernel filled in. Shapes: (T, c_in, H, W) -> (T, c_out, H', W')."""

    def __init__(self, conv, tokens):
        super().__init__()
        self.layer = conv.layer
        self.register_buffer("kernel", conv.kernel(tokens[None])[0].detach())
        self.register_buffer("bias", conv.bias.detach().clone())

    def forward(self, x):
        return convolve(x, self.kernel, self.bias, self.layer)


class PlainNeRV(nn.Module):
    """One video as the network that it is. Shapes: frame (T,) float -> (T, 3, H, W) in [-1, 1]."""

    def __init__(self, decoder, tokens):
        super().__init__()
        self.cfg = decoder.cfg
        self.layers = decoder.layers
        self.convs = nn.ModuleList(PlainConv2d(conv, tokens) for conv in decoder.convs)

    def forward(self, frame):
        x = embed(frame, self.layers[0])                                # (T, 48, h, w)
        return render(self.layers, self.convs, x, self.cfg.side)        # (T, 3, H, W)


def main(argv=None):
    """Print Table A1 for a width and a resolution, layer by layer."""
    parser = argparse.ArgumentParser(
        description="Table A1 of the paper: the layers of the decoder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="S", help="S, B, L or a number of channels")
    parser.add_argument("--resolution", type=int, default=128, help="height = width in pixels")
    parser.add_argument("--gen-channels", type=int, default=64,
                        help="inputs and outputs of a generated block; the 256 x 256 preset takes 80")
    parser.set_defaults(pe_size=8, upsample="transposed", side="residual")
    plan = layer_plan(parser.parse_args(argv))
    row = "{:<12} {:>16} {:>18} {:>18} {:>11} {:>12}"
    print(row.format("layer", "feature map", "kernel in, out", "generated in, out", "parameters",
                     "GFLOP/frame"))
    for layer in plan:
        k = layer.k
        print(row.format(layer.kind,
                         f"[{layer.c_out}, {layer.size}, {layer.size}]",
                         f"[{layer.c_in}, {layer.c_out}, {k}, {k}]",
                         f"[{layer.gen_in}, {layer.gen_out}, {k}, {k}]",
                         f"{layer.numel:,}",
                         f"{layer.flops / 1e9:.3f}"))
    total = sum(layer.numel for layer in plan)
    made = sum(layer.generated for layer in plan)
    tflop = 16 * sum(layer.flops for layer in plan) / 1e12
    print(f"kernels {total / 1e6:.3f}M, of which generated for each video {made / 1e6:.3f}M "
          f"({made / total:.1%}); {tflop:.3f} TFLOP for 16 frames")


# ==================================================================================================================
# The method ends here. Below: the other ways that Tables 2a, 2b, 2d, 2e and NeRV-Enc compare.

# ------------------------------------------------------------- Table 2d: up-sampling; Table 2e: side connections

def ablated_plan(plan, cfg):
    """Table A1 with another up-sampling, or with a toRGB at every level whose outputs are summed.

    Source: paper Tables 2d, 2e. Choice: pixelshuffle and bilinear take 3 x 3 kernels, as A.2's other convolutions
    """
    rows = []
    for layer in plan:
        if layer.kind == "transposed" and cfg.upsample == "bilinear":
            layer = layer._replace(kind="bilinear", k=3, grid=layer.size)
        elif layer.kind == "transposed" and cfg.upsample == "pixelshuffle":
            layer = layer._replace(kind="conv", k=3, c_out=4 * layer.c_out,
                                   gen_out=4 * layer.gen_out)
        if layer.kind == "rgb" and cfg.side == "skip":
            continue
        rows.append(layer)
        if layer.ends_level and cfg.side == "skip":
            gen_in = min(plan[-1].gen_in, layer.c_out)
            rows.append(Layer("rgb", layer.c_out, 3, 3, layer.size, layer.size, gen_in, 3))
    return rows


def render_otherwise(layers, convs, x, side):
    """render without a residual: plain, or with the outputs of all sizes summed ("skip"). Shapes: as render."""
    rgb = None
    for layer, conv in zip(layers, convs):
        if layer.kind != "rgb":
            x = F.gelu(conv(x))                                         # (n, c, size, size)
        elif rgb is None:
            rgb = conv(x)                                               # (n, 3, size, size)
        else:
            rgb = conv(x) + enlarge(rgb, 3)
    return rgb.tanh()                                                   # (n, 3, H, W)


# --------------------------------------------- Table 2a: how tokens enter a kernel; Table 2b: which layer reads which

class FMMConv2d(ModulatedConv2d):
    """Factorized multiplicative modulation: a low-rank factor multiplies the shared kernel.

    Source: INR-GAN, DIGAN (paper Table 2a). Choice: rank 10, as DIGAN; the factor starts as 1 +- 0.3
    """
    rank = 10

    def __init__(self, layer, cfg):
        super().__init__(layer, cfg)
        self.scale = math.sqrt(0.3)                     # a product of two such numbers is 0.3

    def count_generated(self):
        return self.rank * (self.layer.c_out + self.layer.c_in)

    def modulate(self, tokens):
        c_out, c_in, *_ = self.shape
        left, right = self.generated(tokens).split([self.rank * c_out, self.rank * c_in], 1)
        left = left.view(-1, c_out, self.rank)
        right = right.view(-1, self.rank, c_in)
        factor = 1 + left @ right / math.sqrt(self.rank)                # (B, c_out, c_in)
        return factor[..., None, None] * self.shared.view(self.shape)


class RepeatConv2d(ModulatedConv2d):
    """NeRV-Enc's way: each number is repeated four times along one side of the kernel, and multiplies it.

    Source: NeRV-Enc Eq. 3, A.1; B a (normalize), b (conv_init), c (expand). Choice: without conv_init kernels start as
            signs (the appendix names nothing); the factor starts as 1 +- 0.3; four times, and which side B's dim -2 is
    """

    def __init__(self, layer, cfg):
        self.sides = [layer.c_out, layer.c_in, layer.k ** 2]
        self.axis = ["out", "in", "taps"].index(cfg.expand)
        super().__init__(layer, cfg)
        self.scale = 0.3
        self.normalize = cfg.normalize
        self.start_norm = cfg.kernel_init * math.sqrt(layer.c_in * layer.k ** 2)
        if not cfg.conv_init:
            self.shared.data = cfg.kernel_init * self.shared.data.sign()

    def count_generated(self):
        self.quarter = list(self.sides)
        self.quarter[self.axis] = math.ceil(self.sides[self.axis] / 4)
        return math.prod(self.quarter)

    def modulate(self, tokens):
        values = 1 + self.generated(tokens).view(-1, *self.quarter)  # 1: a bias, so that it starts as the kernel
        values = values.repeat_interleave(4, self.axis + 1)
        values = values.narrow(self.axis + 1, 0, self.sides[self.axis])  # (B, c_out, c_in, k*k)
        kernel = self.shared.view(self.sides) * values
        return kernel.view(-1, *self.shape)                             # (B, c_out, c_in, k, k)

    def kernel(self, tokens):
        if self.normalize:
            return super().kernel(tokens)
        return self.modulate(tokens) / self.start_norm * self.gain  # the norm of the start


class FixedConv2d(RepeatConv2d):
    """A layer of NeRV-Dec that reads no tokens: one kernel for all videos."""

    def __init__(self, layer, cfg):
        super().__init__(layer, cfg)
        self.head = None

    def modulate(self, tokens):
        return self.shared.view(self.shape).expand(len(tokens), *self.shape)


def ablated_convs(plan, cfg):
    """The layers of Table 2a ("fmm", "repeat"), of Table 2b ("direct", "none"), and with NeRV-Enc's own tokens.

    Raises: SystemExit for a combination that is not defined
    """
    kinds = {"channel": ModulatedConv2d, "fmm": FMMConv2d, "repeat": RepeatConv2d}
    kind = kinds[cfg.parameterization]
    if cfg.layer_tokens:
        return own_tokens(kind, plan, cfg, *layer_tokens(cfg, len(plan)))
    if cfg.reuse == "none":
        whole = [cfg.token_dim] * len(plan)
        return own_tokens(kind, plan, cfg, tokens_by_block_size(cfg, plan), whole)
    convs = nn.ModuleList(kind(layer, cfg) for layer in plan)
    if cfg.reuse == "direct":                  # choice: one head, every layer reads the same values
        if cfg.parameterization != "channel":
            raise SystemExit("--reuse direct is defined for --parameterization channel only")
        largest = max(convs, key=lambda conv: conv.per_token)
        for conv in convs:
            conv.head = largest.head
    return convs


def own_tokens(kind, plan, cfg, counts, columns):
    """Layers that share no tokens: each reads the next few rows, and the first columns of them."""
    convs = nn.ModuleList()
    start = 0
    for layer, count, width in zip(plan, counts, columns):
        if count:
            conv = kind(layer, dataclasses.replace(cfg, tokens=count, token_dim=width))
        else:
            conv = FixedConv2d(layer, cfg)
        conv.rows = slice(start, start + count)
        conv.columns = width
        convs.append(conv)
        start += count
    return convs


def tokens_by_block_size(cfg, plan):
    """Table 2b's "no reuse": one token for every layer, the others by block size, rounded on the running sum."""
    if cfg.tokens < len(plan):
        raise SystemExit(f"--reuse none needs at least {len(plan)} tokens, one for each layer")
    sizes = [layer.generated for layer in plan]
    spare = cfg.tokens - len(plan)
    ends = [round(spare * reached / sum(sizes)) for reached in accumulate(sizes, initial=0)]
    return [1 + end - start for start, end in pairwise(ends)]


# ---------------------------------------------------------------------------------------------- NeRV-Enc

def nerv_dec_plan(cfg):
    """NeRV-Dec, the decoder of NeRV-Enc: time alone goes in, four convolutions enlarge four times each.

    Source: NeRV-Enc A.5 (kernels 1, 3, 3, 3, factors 4, 4, 4, 4, positions of 16). Choice: widths 16, 32, 16, which
            the appendix leaves out; with them its tokens (4 x 256, 128 x 144, 64 x 288) are exactly a quarter of each
            kernel, so that repeating every number four times fills it
    """
    sizes = (cfg.pe_size, cfg.resolution)
    if sizes != (1, 256) or cfg.side != "none" or cfg.parameterization == "channel":
        raise SystemExit("--model nerv_dec goes from 1 to 256 pixels, whole kernels at a time, without "
                         "side paths; use --pe-size 1 --resolution 256 --side none "
                         "--parameterization repeat")
    return [                            # c_out is 16 times the width, as 4 x 4 pixels come of every cell
        Layer("stem", PE_DIM, 256, 1, 1, 4, 0, 0),
        Layer("conv", 16, 512, 3, 4, 16, 0, 0),
        Layer("conv", 32, 256, 3, 16, 64, 0, 0),
        Layer("rgb", 16, 48, 3, 64, 256, 0, 0),
    ]


def layer_tokens(cfg, layers):
    """NeRV-Enc's layer-adaptive tokens: "4x256,0x0" gives the first layer 4 tokens of 256 numbers, the second none.

    Returns how many rows, and how many columns of them, of the (N, d) tokens each layer reads.
    Raises: SystemExit when they are not one pair a layer, or do not add up to cfg.tokens rows of cfg.token_dim columns
    Source: NeRV-Enc A.5. Choice: all stand in one (N, d) tensor, so that everything else need not know; the shorter
            ones leave the end of their rows unused (zero)
    """
    try:
        pairs = [map(int, pair.split("x")) for pair in cfg.layer_tokens.split(",")]
        counts, columns = zip(*pairs)
    except ValueError as error:
        raise SystemExit(f"--layer-tokens {cfg.layer_tokens} is not like 4x256,128x144,0x0") from error
    if len(pairs) != layers or sum(counts) != cfg.tokens or max(columns) != cfg.token_dim:
        raise SystemExit(f"--layer-tokens {cfg.layer_tokens} needs {layers} pairs, "
                         f"--tokens {sum(counts)} and --token-dim {max(columns)}")
    return counts, columns


if __name__ == "__main__":
    main()
