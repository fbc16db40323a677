"""Segmentation networks of the libraries that people use, by name, with random weights (seeded).

Run in the environment that zoo_matrix makes; each library is imported when one of its networks is made.
"""

import re
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

CLASSES = 5


def _torchvision() -> None:
    """Import torchvision beside a torch of another build, whose operators of its own then have no kernels."""
    library = None
    while True:
        try:
            import torchvision  # noqa: F401

            return
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            library = library or torch.library.Library("torchvision", "DEF")
            library.define(f"{missing[1]}(Tensor image) -> Tensor")
            _KEPT.append(library)


_KEPT: list[torch.library.Library] = []  # an operator is gone with its library


def _smp(architecture: str, encoder: str = "resnet18", **more) -> Callable:
    def make():
        import segmentation_models_pytorch as smp

        return getattr(smp, architecture)(encoder, encoder_weights=None, classes=CLASSES, **more)

    return make


def _vision(name: str) -> Callable:
    def make():
        from torchvision.models import segmentation

        return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES)

    return make


def _hf(model: str, config: str, **fields) -> Callable:
    def make():
        import transformers

        made = {key: value() if callable(value) else value for key, value in fields.items()}
        return getattr(transformers, model)(getattr(transformers, config)(num_labels=CLASSES, **made))

    return make


def _hf_config(name: str, **fields) -> Callable:
    def make():
        import transformers

        return getattr(transformers, name)(**fields)

    return make


def _monai(name: str, **fields) -> Callable:
    def make():
        from monai.networks import nets

        return getattr(nets, name)(spatial_dims=2, in_channels=3, out_channels=CLASSES, **fields)

    return make


def _nnunet(name: str, **fields) -> Callable:
    def make():
        from dynamic_network_architectures.architectures import unet
        from torch import nn

        return getattr(unet, name)(
            3, 4, (16, 32, 64, 96), nn.Conv2d, 3, (1, 2, 2, 2), num_classes=CLASSES, n_conv_per_stage_decoder=1,
            conv_bias=True, norm_op=nn.InstanceNorm2d, norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, **fields,
        )  # fmt: skip

    return make


def _cv(name: str, **fields) -> Callable:
    def make():
        from pytorchcv.model_provider import get_model

        return get_model(name, pretrained=False, num_classes=CLASSES, **fields)

    return make


_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_DYN = {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3, "filters": [16, 32, 64, 96]}
NETWORKS: dict[str, Callable] = {
    "smp-unet-resnet18": _smp("Unet"),
    "smp-unet-mobilenet": _smp("Unet", "mobilenet_v2"),
    "smp-unet-efficientnet": _smp("Unet", "timm-efficientnet-b0"),
    "smp-unet-mit": _smp("Unet", "mit_b0"),
    "smp-unet-scse": _smp("Unet", decoder_attention_type="scse"),
    "smp-unetplusplus": _smp("UnetPlusPlus"),
    "smp-manet": _smp("MAnet"),
    "smp-linknet": _smp("Linknet"),
    "smp-fpn": _smp("FPN"),
    "smp-pspnet": _smp("PSPNet"),
    "smp-deeplabv3": _smp("DeepLabV3"),
    "smp-deeplabv3plus": _smp("DeepLabV3Plus"),
    "smp-pan": _smp("PAN"),
    "smp-upernet": _smp("UPerNet"),
    "smp-segformer": _smp("Segformer", "mit_b0"),
    "torchvision-fcn": _vision("fcn_resnet50"),
    "torchvision-deeplabv3": _vision("deeplabv3_mobilenet_v3_large"),
    "torchvision-lraspp": _vision("lraspp_mobilenet_v3_large"),
    "hf-segformer": _hf("SegformerForSemanticSegmentation", "SegformerConfig", depths=[1, 1, 1, 1]),
    "hf-upernet-convnext": _hf(
        "UperNetForSemanticSegmentation", "UperNetConfig", hidden_size=64, auxiliary_in_channels=384,
        backbone_config=_hf_config("ConvNextConfig", depths=[1, 1, 1, 1], out_features=_STAGES),
    ),
    "hf-upernet-swin": _hf(
        "UperNetForSemanticSegmentation", "UperNetConfig", hidden_size=64,
        backbone_config=_hf_config("SwinConfig", depths=[1, 1, 1, 1], out_features=_STAGES),
    ),
    "hf-mobilenetv2-deeplab": _hf("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config"),
    "hf-mobilevitv2": _hf("MobileViTV2ForSemanticSegmentation", "MobileViTV2Config"),
    "hf-beit": _hf(
        "BeitForSemanticSegmentation", "BeitConfig", num_hidden_layers=4, hidden_size=192, num_attention_heads=3,
        intermediate_size=384, out_indices=[0, 1, 2, 3], use_mask_token=False,
    ),
    "hf-dpt": _hf(
        "DPTForSemanticSegmentation", "DPTConfig", num_hidden_layers=4, hidden_size=192, num_attention_heads=3,
        intermediate_size=384, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[32, 64, 96, 128],
        fusion_hidden_size=64,
    ),
    "monai-unet": _monai("UNet", channels=(16, 32, 64, 128), strides=(2, 2, 2)),
    "monai-basicunet": _monai("BasicUNet"),
    "monai-basicunetplusplus": _monai("BasicUNetPlusPlus", features=(16, 16, 32, 64, 96, 16)),
    "monai-attentionunet": _monai("AttentionUnet", channels=(16, 32, 64), strides=(2, 2)),
    "monai-dynunet": _monai("DynUNet", **_DYN),
    "monai-dynunet-supervised": _monai("DynUNet", deep_supervision=True, deep_supr_num=2, **_DYN),
    "monai-segresnet": _monai("SegResNet"),
    "monai-flexibleunet": _monai("FlexibleUNet", backbone="efficientnet-b0", pretrained=False),
    "monai-unetr": _monai("UNETR", img_size=96, hidden_size=192, mlp_dim=384, num_heads=3),
    "monai-swinunetr": _monai("SwinUNETR", feature_size=12, depths=(1, 1, 1, 1), num_heads=(3, 3, 3, 3)),
    "nnunet-plain": _nnunet("PlainConvUNet", n_conv_per_stage=2),
    "nnunet-residual": _nnunet("ResidualEncoderUNet", n_blocks_per_stage=1),
    "nnunet-supervised": _nnunet("PlainConvUNet", n_conv_per_stage=2, deep_supervision=True),
    "cv-bisenet": _cv("bisenet_resnet18_celebamaskhq"),
    "cv-icnet": _cv("icnet_resnetd50b_cityscapes", fixed_size=False),
    "cv-sinet": _cv("sinet_cityscapes", fixed_size=False),
    "cv-fastscnn": _cv("fastscnn_cityscapes", fixed_size=False),
    "cv-cgnet": _cv("cgnet_cityscapes"),
    "cv-dabnet": _cv("dabnet_cityscapes"),
    "cv-enet": _cv("enet_cityscapes"),
    "cv-erfnet": _cv("erfnet_cityscapes"),
    "cv-edanet": _cv("edanet_cityscapes"),
    "cv-esnet": _cv("esnet_cityscapes"),
    "cv-lednet": _cv("lednet_cityscapes", fixed_size=False),
    "cv-linknet": _cv("linknet_cityscapes"),
    "cv-segnet": _cv("segnet_cityscapes"),
    "cv-unet": _cv("unet_cityscapes"),
    "cv-danet": _cv("danet_resnetd50b_cityscapes", fixed_size=False),
    "cv-pspnet": _cv("pspnet_resnetd50b_voc", fixed_size=False),
}  # fmt: skip


def network(name: str) -> torch.nn.Module:
    """A network of this name with random weights, and statistics of its batch norms that fit them."""
    _torchvision()  # an exporter of PyTorch imports it wherever it is
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # a true mean over what follows
    with torch.no_grad(), suppress(Exception):  # of those that want another size
        model.train()(torch.randn(2, 3, 224, 224))
    return model.eval()


def __getattr__(name: str) -> Callable:
    """`zoo_networks:smp_unet_resnet18`, as export-onnx names factories."""
    key = name.replace("_", "-")
    if key not in NETWORKS:
        raise AttributeError(name)
    return lambda: network(key)
