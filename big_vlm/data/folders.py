"""A folder of pictures: a class per folder, or captions beside them.

    pets/cat/001.jpg            {'image': Path, 'label': 0, 'class': 'cat'}
    pets/dog/deep/002.jpg       {'image': Path, 'label': 1, 'class': 'dog'}

    photos/001.jpg, 001.txt     {'image': Path, 'caption': 'two boats at a quay'}

Classes are the folders right below, empty ones too, in the order of their names; both kinds may be had at once. Behind
an address, where only files make folders, an empty one is none.
"""

from collections.abc import Sequence

from big_vlm.data import paths
from big_vlm.data.indexed import SPLIT, BadRecord, Indexed, files_of

PICTURES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff')


class Folder(Indexed):
    """The pictures below a folder, in the order of their paths, links and hidden files left out.

    Where any picture has a text beside it, `caption` is what it says, and a picture without one is a bad record.
    Raises UserError for a folder without pictures and for a slice that is none.
    """

    def __init__(self, path: paths.AnyPath, split: str = SPLIT):
        below = [file for file in path.rglob('*') if not any(p.startswith('.') for p in file.relative_to(path).parts)]
        pictures = [file for file in below if file.suffix.lower() in PICTURES and not file.is_symlink()]
        pictures = files_of(pictures, f'pictures ({" ".join(PICTURES)}) in {path}')
        self.path = path
        self.files = [str(file.relative_to(path)) for file in pictures]
        self.classes = sorted(name for name in paths.folders(path) if not name.startswith('.'))
        texts = {file for file in below if file.suffix == '.txt'}
        self.captioned = any(file.with_suffix('.txt') in texts for file in pictures)
        self._choose(str(path), len(self.files), split)

    def _read(self, rows: Sequence[int]) -> list[dict]:
        return [self._record(self.files[row]) for row in rows]

    def _record(self, file: str) -> dict:
        record: dict = {'image': self.path / file}
        if '/' in file:
            name = file.split('/')[0]
            record |= {'label': self.classes.index(name), 'class': name}
        if self.captioned:
            text = record['image'].with_suffix('.txt')
            try:
                record['caption'] = text.read_text(encoding='utf-8-sig').strip()
            except OSError as error:
                raise BadRecord(f'{record["image"]}: no caption: {text}: {error.strerror}') from error
            except UnicodeDecodeError as error:
                raise BadRecord(f'{text}: no UTF-8: {error}') from error
        return record
