"""A directory of pictures, in one folder per class or all together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.data.config import DataConfig
from equipoise.data.images import apply, decode_picture
from equipoise.data.readers.base import PICTURES, DataSet, Sample, label_indices
from equipoise.errors import DataError
from equipoise.spec import Array


def read(path: Path | None, *, config: DataConfig) -> DataSet:
    """Read the pictures below ``path`` as the model takes them; folders directly in it are classes.

    Raises:
        DataError: No picture, one that cannot be read, no preprocessing, or labels that are needed
            and are not there.
    """
    folder = path or Path()
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise DataError(f"{folder}: there is no picture ({', '.join(sorted(PICTURES))})")
    if config.preprocessing is None:
        raise DataError(
            f"{folder}: what the model does to pictures is not known",
            hint="Give its preprocessor_config.json with --preprocessing.",
        )
    classes = sorted(
        {file.relative_to(folder).parts[0] for file in files if _in_class(file, folder)}
    )
    labels = config.labels or tuple(classes)
    return DataSet(evaluation=_Pictures(files, folder, config=config, labels=labels), labels=labels)


def _in_class(file: Path, folder: Path) -> bool:
    return len(file.relative_to(folder).parts) > 1


class _Pictures(Sequence[Sample]):
    """Samples that are read when they are asked for: decoded pictures do not fit in memory."""

    def __init__(
        self, files: Sequence[Path], folder: Path, *, config: DataConfig, labels: Sequence[str]
    ) -> None:
        self._files, self._folder = files, folder
        self._config, self._labels = config, labels

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            files = self._files[index]
            return _Pictures(files, self._folder, config=self._config, labels=self._labels)
        return self._sample(self._files[index])

    def _sample(self, file: Path) -> Sample:
        assert self._config.preprocessing is not None  # noqa: S101  read() has checked
        pixels = apply(decode_picture(file), self._config.preprocessing)
        name = self._config.input_name or "pixel_values"
        return Sample(feeds={name: pixels}, label=self._label(file))

    def _label(self, file: Path) -> Array:
        if not _in_class(file, self._folder):
            if self._config.labelled:
                raise DataError(
                    f"{file}: a picture outside the folders of the classes has no label",
                    hint="Put each picture into a folder that is called like its class.",
                )
            return np.zeros((), dtype=np.int64)
        name = file.relative_to(self._folder).parts[0]
        return label_indices([name], self._labels, where=str(file)).reshape(())
