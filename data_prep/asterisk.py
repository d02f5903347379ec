"""Two hours of real speech in five languages: Asterisk's voice prompts from Debian packages, without root.

Every prompt id is spoken in up to five languages, so the same set serves speech models and speech translation.
`fetch_text` downloads English text (WordNet's definitions and examples) the same way.

Any version that this machine's apt offers is accepted as long as the files we read from it have known hashes. They are
identical in Debian 11, 12, 13 and unstable, and Ubuntu 22.04, 24.04, 25.04, 25.10 and 26.04.
"""

import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_soda.audio.sound import Sound
from megatron_soda.errors import SodaError
from megatron_soda.files import write_json, write_text

from .utterance import Reject, Utterance, one_line

LANGUAGES = ("en", "es", "fr", "it", "ru")
CONTENT = {  # for each package, the SHA-256 of the files that are read (see _content)
    "asterisk-core-sounds-en": "f82927452020e7f13055565302da04afc1f531f3edc7c6e6c3ed2969fb7c5a71",
    "asterisk-core-sounds-en-g722": "75399323a6ff62fdfa052bdd00fc0d017113be6e4f1ec58e04d430ddd0b39f7e",
    "asterisk-core-sounds-es": "d6cddd1f4d369b2dff39dec0c624f16e135e56410e029d4226827dae036244f3",
    "asterisk-core-sounds-es-g722": "9695cada2716186f610831b6f2b7a21d4df94173d18bc83d2cd0f6105a3a85da",
    "asterisk-core-sounds-fr": "b4bb255c3fa6ffad40c1fbdea447b27a4528fe5b38595273ef423fa22f423811",
    "asterisk-core-sounds-fr-g722": "ec2da133274a5eff5203bcdd3e552d5a07a2e3150dc9c058d24fbe53b16521de",
    "asterisk-core-sounds-it": "69bd3a00687f5ffe5878d2b29d2b8a2b826c69d19bbd4912842e8bbb24ddd10f",
    "asterisk-core-sounds-it-g722": "49671eef70a41e8b9dce2f4a56b4edafe507f9b2fdabb1b6ad1e374c97824e9a",
    "asterisk-core-sounds-ru": "a396126d6db007f34feb7120df823f7a769ec8ca09fc4bfb6c4bc61bcaba3fc0",
    "asterisk-core-sounds-ru-g722": "c8d3ac6ffb4346a92a9f81eed1c890e711313d81f0bad473fabfd9f5a6012aa8",
    "wordnet-base": "ed9b2f6cd7f890a6ef6d620db525776b187918925ba05e2b8d4d37c4e16ff80a",
}
STAMP = "complete.json"  # in a language's folder, written last
TEXT_BYTES = 2_000_000
INSTEAD = "Or use your own recordings: give --speech DIR, a folder of sound files with a manifest."
NOT_IN_SOURCES = ("Unable to locate package", "no installation candidate", "Can't find a source to download")


def fetch(folder: Path, languages: list[str]) -> None:
    """Downloads and unpacks the prompts of these languages into `folder`/LANGUAGE (about 25 MB each).

    Complete languages are skipped and complete downloads reused, so an interrupted fetch resumes where it stopped.
    Writes `folder`/ATTRIBUTION.md, which the licences require. Raises SodaError if apt or dpkg-deb is missing, there is
    no network, or a package has unexpected content.
    """
    folder = Path(folder)
    for language in _known(languages):
        if not _is_complete(folder / language):
            shutil.rmtree(folder / language, ignore_errors=True)
            name = f"asterisk-core-sounds-{language}"
            try:
                packages = [_unpack_package(folder, part, folder / language) for part in (name, f"{name}-g722")]
            except SodaError as error:
                raise SodaError(f"{error}\n{INSTEAD}") from None
            write_json(folder / language / STAMP, {"packages": packages, "files": _listing(folder / language)})
    shutil.rmtree(folder / "apt", ignore_errors=True)
    write_text(folder / "ATTRIBUTION.md", _attribution(folder))


def read(folder: Path, languages: list[str]) -> tuple[list[Utterance], list[Reject]]:
    """The utterances of these languages, ordered by language and prompt id. The audio is 16 kHz G.722.

    `id` is LANGUAGE/ID, where ID is Asterisk's id, the same in every language; `prompt` is that id. A sound without
    words (a tone or silence, whose transcript is empty or begins with [ < or a parenthesis) becomes a Reject, as does a
    transcript without sound. Raises SodaError for a language that was not fetched.
    """
    found: list[Utterance] = []
    rejects: list[Reject] = []
    for language in _known(languages):
        root = Path(folder) / language
        if not _is_complete(root):
            raise SodaError(f"{root}: the {language} prompts are missing or incomplete; fetch them first")
        texts, bad_lines = _transcripts(root, language)
        rejects += bad_lines
        sounds = _sounds(root)
        for prompt, audio in sorted(sounds.items()):
            text = texts.get(prompt, "")
            if not text:
                rejects.append(Reject(f"{language}/{prompt}", "no transcript"))
            elif text[0] in "[<(":
                rejects.append(Reject(f"{language}/{prompt}", f"no speech: {text}"))
            else:
                speaker = audio.relative_to(_sound_folder(root)).parts[0].split("_")[-1]  # en_US_f_Allison
                found.append(Utterance(f"{language}/{prompt}", Sound(str(audio)), text, speaker, language, prompt))
        rejects += [Reject(f"{language}/{prompt}", "no audio") for prompt in sorted(texts.keys() - sounds.keys())]
    return found, rejects


def pairs(utterances: list[Utterance]) -> Iterator[Utterance]:
    """Every prompt in every language that has it, followed by the same prompt in another: a recording of two
    utterances, the source and its translation, for each two languages and both directions."""
    by_prompt: dict[str, list[Utterance]] = {}
    for one in utterances:
        by_prompt.setdefault(one.prompt, []).append(one)
    for prompt, some in sorted(by_prompt.items()):
        for source, target in itertools.permutations(some, 2):
            recording = f"{source.language}-{target.language}/{prompt}"
            for one in (source, target):
                yield replace(one, id=f"{recording}/{one.language}", recording=recording)


def fetch_text(folder: Path) -> list[Path]:
    """English text for a text tokenizer or text-only training: one UTF-8 file with one sentence per line, at most 2 MB.

    Contains all of WordNet's example sentences, and definitions until the size is reached. Each line appears once, in a
    fixed order shuffled by hash, so that any part of the file is a fair sample. Writes wordnet-LICENSE.txt beside it.
    Raises SodaError as `fetch` does.
    """
    folder = Path(folder)
    output = folder / "wordnet.txt"
    if not output.is_file():
        unpacked = folder / "wordnet"
        shutil.rmtree(unpacked, ignore_errors=True)
        _unpack_package(folder, "wordnet-base", unpacked)
        licence = (unpacked / "usr/share/doc/wordnet-base/copyright").read_text(encoding="utf-8")
        note = "wordnet.txt has definitions and example sentences of WordNet 3.0 (Debian package wordnet-base).\n\n"
        write_text(folder / "wordnet-LICENSE.txt", note + licence)
        glosses: list[str] = []
        for path in _read_files("wordnet-base", unpacked):
            lines = path.read_text(encoding="utf-8").splitlines()
            glosses += [line.split(" | ", 1)[1] for line in lines if " | " in line]
        write_text(output, "".join(f"{line}\n" for line in _sentences(glosses, TEXT_BYTES)))
        shutil.rmtree(unpacked)
        shutil.rmtree(folder / "apt", ignore_errors=True)
    return [output]


def _sentences(glosses: list[str], limit: int) -> list[str]:
    """Glosses are `definition; "example"; "example"`: examples first, then definitions, up to `limit` bytes."""

    def by_hash(lines: set[str]) -> list[str]:
        return sorted(lines, key=lambda line: hashlib.sha256(line.encode()).digest())

    examples = {one_line(quoted) for gloss in glosses for quoted in re.findall(r'"([^"]+)"', gloss)} - {""}
    definitions = {one_line(gloss.split('"')[0]).rstrip(" ;:,") for gloss in glosses} - {""} - examples
    kept: set[str] = set()
    for line in by_hash(examples) + by_hash(definitions):
        limit -= len(line.encode()) + 1
        if limit < 0:
            break
        kept.add(line)
    return by_hash(kept)


def _known(languages: list[str]) -> list[str]:
    unknown = [language for language in languages if language not in LANGUAGES]
    if unknown or not languages:
        raise SodaError(f"languages {', '.join(unknown) or '(none)'}: there are prompts for {', '.join(LANGUAGES)}")
    return list(dict.fromkeys(languages))


def _sound_folder(root: Path) -> Path:
    return root / "usr/share/asterisk/sounds"


def _sounds(root: Path) -> dict[str, Path]:
    """Prompt id (digits/1) -> sound file (sounds/en_US_f_Allison/digits/1.g722)."""
    voices = _sound_folder(root)
    files = voices.rglob("*.g722")
    return {"/".join(file.relative_to(voices).with_suffix("").parts[1:]): file for file in files}


def _listing(root: Path) -> str:
    """A hash of the names and sizes of all files, which changes if one is missing, truncated or added."""
    files = sorted((str(p.relative_to(root)), p.stat().st_size) for p in root.rglob("*") if p.is_file())
    return hashlib.sha256(json.dumps([file for file in files if file[0] != STAMP]).encode()).hexdigest()


def _is_complete(root: Path) -> bool:
    try:
        return json.loads((root / STAMP).read_text())["files"] == _listing(root)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _transcript_file(root: Path, language: str) -> Path:
    return root / f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"


def _transcripts(root: Path, language: str) -> tuple[dict[str, str], list[Reject]]:
    """Lines are `id: text`, `;` begins a comment. If two lines have the same id, the first is right and the other a
    mistake (Spanish has the text of digits/10 as a second digits/0)."""
    packed = _transcript_file(root, language)
    name = packed.stem
    try:
        lines = gzip.decompress(packed.read_bytes()).decode("utf-8-sig").splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SodaError(f"{packed}: cannot be read ({error}); delete {root} and fetch it again") from None
    texts: dict[str, str] = {}
    rejects: list[Reject] = []
    for number, line in enumerate(lines, start=1):
        prompt, colon, text = line.partition(":")
        if not line.strip() or line.startswith(";"):
            continue
        if not colon:
            rejects.append(Reject(f"{name}:{number}", "not 'id: text'"))
        elif prompt.strip() in texts:
            rejects.append(Reject(f"{name}:{number}", f"a second line: {prompt.strip()}"))
        else:
            # "dash [-]": the sign is not spoken
            texts[prompt.strip()] = one_line(re.sub(r"(?<=\w|\.) \[.\]$", "", text.strip()))
    return texts, rejects


def _unpack_package(folder: Path, name: str, into: Path) -> str:
    """Unpacks a Debian package, downloading it unless a complete copy exists. Returns the file's name."""
    packages = folder / "packages"
    try:
        packages.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        for link in (packages, *packages.parents):
            if link.is_symlink() and not link.exists():
                where = f"{link} is a link to {os.readlink(link)}, which does not exist"
                raise SodaError(f"{where}. Make that folder, or remove the link.") from None
        raise SodaError(f"{packages}: cannot be made ({error.strerror})") from None
    for path in sorted(packages.glob(f"{name}_*.deb")):
        if not _unpack(path, into) and _content(name, into) == CONTENT[name]:
            return path.name
        path.unlink()  # damaged
    partial = packages / f"{name}.part"
    try:
        _apt_download(name, partial, folder / "apt")
        path = next(partial.glob("*.deb"), None)
        failed = _unpack(path, into) if path else "apt-get left no file"
        if path is None or failed:
            raise SodaError(f"{name}: could not be unpacked into {into}.\n  {failed}")
        if (found := _content(name, into)) != CONTENT[name]:
            raise SodaError(
                f"{path.name}: holds different files than any known version of {name} (sha256 {found}, expected "
                f"{CONTENT[name]}), so it was deleted."
            )
        os.replace(path, packages / path.name)
    except SodaError:
        shutil.rmtree(into, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path.name


def _read_files(name: str, root: Path) -> list[Path]:
    """The files that we read from an unpacked package."""
    if name == "wordnet-base":
        return [root / f"usr/share/wordnet/data.{part}" for part in ("noun", "verb", "adj", "adv")]
    if name.endswith("-g722"):
        return sorted(_sound_folder(root).rglob("*.g722"))
    return [_transcript_file(root, name.rpartition("-")[2])]


def _content(name: str, root: Path) -> str:
    """SHA-256 of the paths and contents of the files we read (unzipped, because a zip contains its date)."""
    digest = hashlib.sha256()
    for path in _read_files(name, root):
        try:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
        except (OSError, EOFError, zlib.error):
            return f"of nothing: {path.relative_to(root)} is missing or damaged"
        digest.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def _apt_download(package: str, into: Path, private: Path) -> None:
    """apt-get download needs no root, but it needs package lists. If the system's are not usable, we download our
    own."""
    shutil.rmtree(into, ignore_errors=True)  # left by a killed run
    into.mkdir()
    own_lists = [f"-oDir::State::lists={private.resolve()}/lists", f"-oDir::Cache={private.resolve()}/cache"]
    failed = _run(["apt-get", "download", "-q", package, *(own_lists if private.is_dir() else [])], into)
    if not failed:
        return
    for name in ("lists/partial", "cache/archives/partial"):
        (private / name).mkdir(parents=True, exist_ok=True)
    # Error-Mode: without it a failed update exits with 0.
    update = ["apt-get", "update", "-q", "-oAcquire::Languages=none", "-oAPT::Update::Error-Mode=any", *own_lists]
    update_failed = _run(update, into)
    failed_again = update_failed or _run(["apt-get", "download", "-q", package, *own_lists], into)
    if failed_again:
        shutil.rmtree(private, ignore_errors=True)
        advice = "Is there a network? Run the same command again."
        if any(words in failed_again for words in NOT_IN_SOURCES):
            advice = "None of this system's apt sources has it (it is in Debian's `main` and Ubuntu's `universe`)."
        raise SodaError(
            f"{package}: apt-get could not download it.\n  {failed}\nLists fetched without root did not help:\n"
            f"  {failed_again}\n{advice}"
        )


def _unpack(package: Path, into: Path) -> str:
    """Why it failed, or an empty string if it did not."""
    into.mkdir(parents=True, exist_ok=True)
    return _run(["dpkg-deb", "-x", str(package.resolve()), str(into.resolve())], into)


def _run(command: list[str], folder: Path) -> str:
    """Runs a Debian command in `folder`. Returns "" on success, otherwise the last lines of its output."""
    if shutil.which(command[0]) is None:
        raise SodaError(f"{command[0]} is not installed on this machine, and this comes as a Debian package.")
    options = ["-oAcquire::Retries=1", "-oAcquire::http::Timeout=20"] if command[0] == "apt-get" else []
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run([*command, *options], cwd=folder, env=environment, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    return "\n  ".join(said[-3:]) if done.returncode else ""


def _attribution(folder: Path) -> str:
    """The notice that CC-BY requires, from the packages' copyright files."""
    text = (
        "# Whose voices these are\n\nThe sound files and transcripts are unchanged copies from Debian's packages.\n"
        "Whoever passes them on, or data made from them, must keep this notice, say what was changed, and for\n"
        "CC-BY-SA keep the licence. The full licences are in LANGUAGE/usr/share/doc/PACKAGE/copyright.\n"
    )
    text += "What is in numbers/ (prepare.numbers) was made of them by cutting, scaling and joining.\n"
    for language in LANGUAGES:
        if _is_complete(folder / language):
            name = f"asterisk-core-sounds-{language}"
            copyright = (folder / language / "usr/share/doc" / name / "copyright").read_text(encoding="utf-8")
            source = re.search(r"^Source: (.*)$", copyright, re.MULTILINE)
            parts = re.split(r"\n\n+", copyright)
            own = [part for part in parts if part.startswith(f"Files: {language}-*\n")]
            general = [part for part in parts if part.startswith("Files: *\n")]
            credits = "\n".join(f"    {line}" for line in (own + general + [""])[0].splitlines())
            packages = ", ".join(json.loads((folder / language / STAMP).read_text())["packages"])
            text += f"\n## {language}: {packages}\n\nSource: {source[1] if source else 'Debian'}\n\n"
            text += credits + "\n"
    return text
