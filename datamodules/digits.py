"""scikit-learn's handwritten digits: 1,797 real 8×8 images that come with the package."""

import torch

from datamodules.images import ByteImages, ImageDataModule


class Digits(ImageDataModule):
    """1,500 training images and 297 held-out ones, by a fixed shuffle.

    The set is too small for three splits: validation and test are the same 297 images, and FID compares with the
    1,500 training images, because 297 are too few for a covariance. Arguments are those of `ImageDataModule`.

    References:
        | E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998
    """

    shape = (1, 8, 8)
    class_names = tuple("0123456789")
    sigma_data = 0.7514
    reference_split = "train"

    def read_split(self, split):
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images)[:, None]
        images = (images * 255 / 16).round().to(torch.uint8)
        labels = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        rows = order[:1500] if split == "train" else order[1500:]
        return ByteImages(images[rows], labels[rows])
