"""Let `import torchvision` succeed where its C++ operators were built for another torch."""

import importlib.util


def repair_torchvision() -> None:
    """Declare the two operator schemas whose absence makes `import torchvision` fail; call before the first import.

    A torchvision whose extension does not load (a CPU-only torch beside a CUDA build of torchvision) stops at
    "operator torchvision::nms does not exist", and `import transformers` of a vision-aware model stops with it.
    Nothing here uses those operators, so declaring them is enough: datasets, transforms.v2 and models then work.
    On a healthy install, or without torchvision, this does nothing.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    import torch

    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError) as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept_alive.append(library)  # the schemas disappear with the object that defined them


_kept_alive: list = []
