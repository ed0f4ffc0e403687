"""The zoo: one row a model, at the smallest size that keeps its architecture, with weights from a seed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import hf
import nets
import torch
from torch import nn
from torchvision import models
from torchvision.models import segmentation as seg
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    build: makes it; inputs: its sample arguments, in order; axes: which of their axes are dynamic.
    quick: in the default suite; half: whether torch itself runs it in f16; waits: what it is refused for as yet.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    quick: bool = False
    half: bool = True
    waits: str = ""

    def model(self) -> nn.Module:
        """The model in eval mode, its weights drawn so that activations neither vanish nor grow with depth."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().eval()
            settle(model, self.inputs())
        return model


@torch.no_grad()
def settle(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Draw weights of variance 1 / fan-in (2 / fan-in before ReLU, for filters), and give batch norms statistics of `inputs`."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, math.sqrt((2 if parameter.dim() > 2 else 1) / parameter[0].numel()))
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
        norm.bias.add_(1)  # most of what ReLU sees is positive: deep random networks are chaotic otherwise
    if norms:  # more samples than the model is run on, or the deepest norms would see two values a channel
        model(*(torch.randn(16, *t.shape[1:]) for t in inputs))
    model.eval()


def x(*shape: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    """One tensor of noise."""
    return lambda: (torch.randn(shape, generator=torch.Generator().manual_seed(1)),)


def ids(*shape: int, high: int = 50) -> tuple[torch.Tensor, ...]:
    return (torch.randint(1, high, shape, generator=torch.Generator().manual_seed(1)),)


B = {0: "B"}
BHW = {0: "B", 2: "H", 3: "W"}
BS = {0: "B", 1: "S"}
BT = {0: "B", 2: "T"}


def resnet(block: type = models.resnet.BasicBlock, layers=(1, 1, 1, 1), **options) -> nn.Module:
    return models.ResNet(block, list(layers), **options)


def bottlenecks(**options) -> nn.Module:
    return resnet(models.resnet.Bottleneck, **options)


def mobilenet_v3(size: str = "small", blocks: int = 5, **options) -> nn.Module:
    settings, last = models.mobilenetv3._mobilenet_v3_conf(f"mobilenet_v3_{size}", **options)
    return models.MobileNetV3(settings[:blocks], last, num_classes=10)


def mobilenet_v2() -> nn.Module:
    settings = [[1, 32, 1, 1], [6, 32, 2, 2], [6, 64, 1, 2]]
    return models.MobileNetV2(10, inverted_residual_setting=settings)


def efficientnet(v2: bool) -> nn.Module:
    from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig

    first = FusedMBConvConfig(1, 3, 1, 32, 32, 1) if v2 else MBConvConfig(1, 3, 1, 32, 32, 1, 1.0, 1.0)
    blocks = [first, MBConvConfig(4, 3, 2, 32, 32, 2, 1.0, 1.0), MBConvConfig(6, 5, 2, 32, 64, 1, 1.0, 1.0)]
    return models.EfficientNet(blocks, 0.2, num_classes=10)


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig

    return models.ConvNeXt([CNBlockConfig(32, 64, 1), CNBlockConfig(64, None, 2)], num_classes=10)


def regnet(se_ratio: float | None) -> nn.Module:
    from torchvision.models.regnet import BlockParams

    return models.RegNet(BlockParams([1, 2], [32, 64], [16, 16], [1.0, 1.0], [2, 2], se_ratio), num_classes=10)


def swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as st

    extra = {} if version == 1 else {"block": st.SwinTransformerBlockV2, "downsample_layer": st.PatchMergingV2}
    return models.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10, **extra)


def vgg() -> nn.Module:
    widths = [32, "M", 64, "M", 64, 64, "M"]
    features = models.vgg.make_layers(widths, batch_norm=True)
    model = models.VGG(features, num_classes=10, init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(64 * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))
    return model


def segmenter(make: Callable[[nn.Module, int], nn.Module]) -> nn.Module:
    """DeepLab or FCN over the first stages of a ResNet with dilated convolutions."""
    from torchvision.models._utils import IntermediateLayerGetter

    body = bottlenecks(replace_stride_with_dilation=[False, True, True], width_per_group=16)
    return make(IntermediateLayerGetter(body, {"layer3": "out"}), 1024)


def lraspp() -> nn.Module:
    return seg.lraspp._lraspp_mobilenetv3(mobilenet_v3(dilated=True), num_classes=4)


class Detector(nn.Module):
    """ResNet with a feature pyramid and RetinaNet's heads: scores and boxes before decoding."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = BackboneWithFPN(resnet(), {"layer2": "0", "layer3": "1", "layer4": "2"}, [128, 256, 512], 64)
        self.head = RetinaNetHead(64, num_anchors=3, num_classes=4)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.head(list(self.backbone(image).values()))


def maxvit() -> nn.Module:
    return models.MaxVit((64, 64), 32, 4, [32, 64], [1, 1], 32, 0.0, num_classes=10)


def vit() -> nn.Module:
    return models.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=10)


IMAGE = {"x": BHW}
CLASSIFICATION = [
    Case("resnet18", resnet, x(2, 3, 64, 64), IMAGE, quick=True),
    Case("resnet50", partial(bottlenecks, num_classes=10), x(2, 3, 64, 64), IMAGE),
    Case("resnext", partial(bottlenecks, groups=4, width_per_group=16), x(2, 3, 64, 64), IMAGE),
    Case("mobilenet_v2", mobilenet_v2, x(2, 3, 64, 64), IMAGE),
    Case("mobilenet_v3_small", mobilenet_v3, x(2, 3, 64, 64), IMAGE, quick=True),
    Case("mobilenet_v3_large", partial(mobilenet_v3, "large", 15), x(2, 3, 64, 64), {"x": B}),
    Case("efficientnet", partial(efficientnet, v2=False), x(2, 3, 32, 32), IMAGE),
    Case("efficientnet_v2", partial(efficientnet, v2=True), x(2, 3, 32, 32), IMAGE),
    Case("convnext", convnext, x(2, 3, 32, 32), IMAGE, quick=True),
    Case("regnet_x", partial(regnet, None), x(2, 3, 32, 32), IMAGE),
    Case("regnet_y", partial(regnet, 0.25), x(2, 3, 32, 32), IMAGE),
    Case("vit", vit, x(2, 3, 64, 64), {"x": B}, quick=True),
    Case("swin", partial(swin, 1), x(2, 3, 32, 32), {"x": B}),
    Case("swin_v2", partial(swin, 2), x(2, 3, 32, 32), {"x": B}),
    Case("maxvit", maxvit, x(2, 3, 64, 64), {"x": B}),
    Case("densenet", partial(models.DenseNet, 16, (2, 2, 2), 32), x(2, 3, 64, 64), IMAGE),
    Case("shufflenet", partial(models.ShuffleNetV2, [1, 1, 1], [24, 32, 64, 128, 256]), x(2, 3, 64, 64), {"x": B}),
    Case(
        "inception_v3", partial(models.Inception3, 10, aux_logits=False, init_weights=False), x(2, 3, 96, 96), {"x": B}
    ),
    Case(
        "googlenet",
        partial(models.GoogLeNet, 10, aux_logits=False, init_weights=False),
        x(2, 3, 64, 64),
        {"x": B},
    ),
    Case("mnasnet", partial(models.MNASNet, 0.5, num_classes=10), x(2, 3, 64, 64), {"x": B}),
    Case("squeezenet", partial(models.SqueezeNet, "1_1", 10), x(2, 3, 64, 64), {"x": B}),
    Case("vgg", vgg, x(2, 3, 32, 32), {"x": B}, quick=True),
    Case("mixer", nets.Mixer, x(2, 3, 32, 32), {"input": B}, quick=True),
]

DENSE = [
    Case(
        "deeplab_v3",
        partial(segmenter, lambda body, n: seg.DeepLabV3(body, seg.deeplabv3.DeepLabHead(n, 4, [2, 4, 6]))),
        x(2, 3, 64, 64),
        IMAGE,
    ),
    Case(
        "fcn",
        partial(segmenter, lambda body, n: seg.FCN(body, seg.fcn.FCNHead(n, 4))),
        x(2, 3, 64, 64),
        IMAGE,
    ),
    Case("lraspp", lraspp, x(2, 3, 64, 64), {"input": BHW}),
    Case("retinanet", Detector, x(2, 3, 64, 64), {"image": B}, quick=True),
    Case("unet", nets.UNet, x(2, 3, 32, 32), {"image": B}, quick=True),
    Case("vae_decoder", nets.VaeDecoder, x(2, 4, 8, 8), {"latent": BHW}),
]

SIGNAL = [
    Case("tcn", nets.Tcn, x(2, 8, 20), {"signal": BT}, quick=True),
    Case("conformer", nets.Conformer, x(2, 30, 40), {"mel": {0: "B", 1: "T"}}),
    Case("ds_cnn", nets.DsCnn, x(2, 20, 20), {"mel": {0: "B", 1: "T"}}),
    Case("keyword_spotter", nets.KeywordSpotter, x(2, 4000), {"audio": B}, quick=True, half=False),
    Case("lstm_tagger", nets.Tagger, lambda: ids(2, 7), {"ids": BS}),
]


def tokens() -> tuple[torch.Tensor, ...]:
    """Ids and a mask that hides the end of the second row."""
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    return (*ids(2, 7), mask)


def cached(past: int = 5, width: int = 16) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Two tokens, encoder states, and keys and values of two layers."""

    def make() -> tuple[torch.Tensor, ...]:
        shapes = [(2, 6, 64), *[(2, 4, past, width)] * 4]
        noise = torch.Generator().manual_seed(2)
        return (*ids(2, 3), *(torch.randn(shape, generator=noise) for shape in shapes))

    return make


TEXT = {"args_0": BS, "args_1": BS}
CACHE = {
    "ids": BS,
    "encoded": {0: "B", 1: "E"},
    **{f"cached_{i}": {0: "B", 2: "P"} for i in range(2, 6)},
}
WAVE = {"args_0": {0: "B", 1: "T"}}
PIXELS = {"args_0": B}

TRANSFORMERS = [
    Case("bert", hf.bert, tokens, TEXT, quick=True),
    Case("albert", hf.albert, tokens, TEXT),
    Case("distilbert", hf.distilbert, tokens, TEXT),
    Case("roberta", hf.roberta, tokens, TEXT),
    Case("t5_encoder", hf.t5_encoder, tokens, TEXT),
    Case("t5_decoder", hf.t5_decoder, cached(), CACHE),
    Case("whisper_encoder", hf.whisper_encoder, x(2, 16, 40), PIXELS),
    Case("whisper_decoder", hf.whisper_decoder, cached(), CACHE, quick=True),
    Case("wav2vec2", hf.wav2vec2, x(2, 400), WAVE),
    Case("wav2vec2_conformer", hf.wav2vec2_conformer, x(2, 400), WAVE),
    Case("clip_vision", hf.clip_vision, x(2, 3, 32, 32), PIXELS, quick=True),
    Case("clip_text", hf.clip_text, tokens, TEXT),
    Case("hf_vit", hf.vit, x(2, 3, 32, 32), PIXELS),
    Case("deit", hf.deit, x(2, 3, 32, 32), PIXELS),
]

ZOO = [*CLASSIFICATION, *DENSE, *SIGNAL, *TRANSFORMERS]
