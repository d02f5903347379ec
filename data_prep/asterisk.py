"""Real speech in five languages, 2 hours: the voice prompts of Asterisk, from Debian's packages, without root.

Every prompt id is spoken in up to five languages, so the same set serves speech models and speech translation.
`fetch_text` gets English text (WordNet's definitions and examples) the same way.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from megatron_soda.errors import SodaError
from megatron_soda.files import atomic_path, write_json, write_text

from .split import group_prompts
from .utterance import Reject, Sound, Utterance, one_line, prompt_key

LANGUAGES = ("en", "es", "fr", "it", "ru")
SHA256 = {  # of Debian's packages, version by version
    ("asterisk-core-sounds-en", "1.6.1-1"): "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    ("asterisk-core-sounds-en-g722", "1.6.1-1"): "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    ("asterisk-core-sounds-es", "1.6.1-1"): "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
    ("asterisk-core-sounds-es-g722", "1.6.1-1"): "e4e3b4281057d3b81b779298fd6be705f57411513955c518eed1bcaabbd615b8",
    ("asterisk-core-sounds-fr", "1.6.1-1"): "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
    ("asterisk-core-sounds-fr-g722", "1.6.1-1"): "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0",
    ("asterisk-core-sounds-it", "1.6.1-1"): "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
    ("asterisk-core-sounds-it-g722", "1.6.1-1"): "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016",
    ("asterisk-core-sounds-ru", "1.6.1-1"): "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
    ("asterisk-core-sounds-ru-g722", "1.6.1-1"): "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b",
    ("wordnet-base", "1:3.0-37"): "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
}
STAMP = "complete.json"  # in a language's folder, written last
TEXT_BYTES = 2_000_000
INSTEAD = "Or use your own recordings: give --speech DIR, a folder of sound files with a manifest."


def fetch(folder: Path, languages: list[str]) -> None:
    """Downloads and unpacks the prompts of these languages into `folder`/LANGUAGE (about 25 MB each).

    A language that is there and whole is skipped, and a package that was downloaded whole is not downloaded again,
    so an interrupted fetch goes on where it was. Writes `folder`/ATTRIBUTION.md, which the licences ask to keep.
    Raises SodaError when apt or dpkg-deb is missing, there is no network, or a package is not the expected one.
    """
    folder = Path(folder)
    for language in _known(languages):
        if not _is_complete(folder / language):
            names = [name for name, _ in SHA256 if name.removesuffix("-g722") == f"asterisk-core-sounds-{language}"]
            for name in names:
                _unpack(_package(folder, name), folder / language)
            write_json(folder / language / STAMP, {"packages": names, "files": len(_sounds(folder / language))})
    shutil.rmtree(folder / "apt", ignore_errors=True)
    write_text(folder / "ATTRIBUTION.md", _attribution(folder))


def read(folder: Path, languages: list[str]) -> tuple[list[Utterance], list[Reject]]:
    """The utterances of these languages, in the order of language and prompt id. The audio is 16 kHz G.722.

    `id` is LANGUAGE/ID with Asterisk's id, the same in every language. `prompt` is that id too, but ids that share a
    text in one of these languages, also by way of others, have one `prompt`: the smallest of them. A sound without
    words (a tone, silence: its transcript is empty or begins with [ < or a parenthesis) is a Reject, as is a transcript
    that has no sound. Raises SodaError for a language that was not fetched.
    """
    found: list[Utterance] = []
    rejects: list[Reject] = []
    for language in _known(languages):
        root = Path(folder) / language
        if not _is_complete(root):
            raise SodaError(f"{root}: the {language} prompts are not there or not whole; fetch them first")
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
    groups = group_prompts(sorted((u.prompt, prompt_key(u.text, otherwise=u.id)) for u in found))
    smallest = {prompt: group[0] for group in groups for prompt in group}
    return [replace(u, prompt=smallest[u.prompt]) for u in found], rejects


def fetch_text(folder: Path) -> list[Path]:
    """English text for a text tokenizer or text-only training: one UTF-8 file, one sentence a line, 2 MB at most.

    All of WordNet's example sentences, and definitions up to the size; each line once, in an order that is fixed
    and mixed (by hash), so that any part of the file is a fair sample. Writes wordnet-LICENSE.txt beside it.
    Fails as `fetch` does.
    """
    folder = Path(folder)
    output = folder / "wordnet.txt"
    if not output.is_file():
        unpacked = folder / "wordnet"
        _unpack(_package(folder, "wordnet-base"), unpacked)
        licence = (unpacked / "usr/share/doc/wordnet-base/copyright").read_text(encoding="utf-8")
        note = "wordnet.txt has definitions and example sentences of WordNet 3.0 (Debian package wordnet-base).\n\n"
        write_text(folder / "wordnet-LICENSE.txt", note + licence)
        glosses: list[str] = []
        for part in ("noun", "verb", "adj", "adv"):
            lines = (unpacked / f"usr/share/wordnet/data.{part}").read_text(encoding="utf-8").splitlines()
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


def _is_complete(root: Path) -> bool:
    try:
        return json.loads((root / STAMP).read_text())["files"] == len(_sounds(root))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _transcripts(root: Path, language: str) -> tuple[dict[str, str], list[Reject]]:
    """Lines are `id: text`, `;` begins a comment. Of two lines with one id the first is the right one: the other is
    a slip (Spanish has the text of digits/10 as a second digits/0)."""
    name = f"core-sounds-{language}.txt"
    packed = root / f"usr/share/doc/asterisk-core-sounds-{language}" / f"{name}.gz"
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


def _package(folder: Path, name: str) -> Path:
    """Debian's package file, downloaded unless it is there and whole."""
    version, expected = next((key[1], digest) for key, digest in SHA256.items() if key[0] == name)
    path = folder / "packages" / f"{name}_{version.replace(':', '%3a')}_all.deb"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SodaError(f"{path.parent}: cannot be made ({error.strerror})") from None
    if path.is_file() and _sha256(path) == expected:
        return path
    with atomic_path(path) as temporary:
        partial = temporary.with_suffix(".part")
        try:
            _apt_download(f"{name}={version}", partial, folder / "apt")
            downloaded = next(partial.glob("*.deb"), None)
            found = _sha256(downloaded) if downloaded else "no file"
            if downloaded is None or found != expected:
                raise SodaError(
                    f"{name} {version}: not the expected package (sha256 {found}, expected {expected}), so it was "
                    f"thrown away. Try again; another distribution's build of it does not match either. {INSTEAD}"
                )
            os.replace(downloaded, temporary)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def _apt_download(package: str, into: Path, private: Path) -> None:
    """apt-get download needs no root, but package lists: where the system's do not serve, lists of our own."""
    shutil.rmtree(into, ignore_errors=True)  # a killed run's
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
        raise SodaError(
            f"{package}: apt-get could not download it.\n  {failed}\nLists fetched without root did not help:\n"
            f"  {failed_again}\nIs there a network? Run `apt-get update` as root and try again. {INSTEAD}"
        )


def _unpack(package: Path, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    if failed := _run(["dpkg-deb", "-x", str(package.resolve()), str(into.resolve())], into):
        raise SodaError(f"{package}: dpkg-deb could not unpack it into {into}.\n  {failed}")


def _run(command: list[str], folder: Path) -> str:
    """Runs a command of Debian's in `folder`: "" when it did well, else the last lines of what it said."""
    if shutil.which(command[0]) is None:
        raise SodaError(f"{command[0]} is not on this machine: these prompts come as Debian packages. {INSTEAD}")
    options = ["-oAcquire::Retries=1", "-oAcquire::http::Timeout=20"] if command[0] == "apt-get" else []
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run([*command, *options], cwd=folder, env=environment, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    return "\n  ".join(said[-3:]) if done.returncode else ""


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _attribution(folder: Path) -> str:
    """The notice that CC-BY asks for, from the copyright files that came with the packages."""
    text = (
        "# Whose voices these are\n\nThe sound files and transcripts are unchanged copies from Debian's packages.\n"
        "Who passes them on, or data made from them, keeps this notice, says what was changed, and for CC-BY-SA\n"
        "keeps the licence. The full licences are in LANGUAGE/usr/share/doc/PACKAGE/copyright.\n"
    )
    for language in LANGUAGES:
        if _is_complete(folder / language):
            name = f"asterisk-core-sounds-{language}"
            copyright = (folder / language / "usr/share/doc" / name / "copyright").read_text(encoding="utf-8")
            source = re.search(r"^Source: (.*)$", copyright, re.MULTILINE)
            parts = re.split(r"\n\n+", copyright)
            own = [part for part in parts if part.startswith(f"Files: {language}-*\n")]
            general = [part for part in parts if part.startswith("Files: *\n")]
            credits = "\n".join(f"    {line}" for line in (own + general + [""])[0].splitlines())
            text += f"\n## {language}: {name}, {name}-g722 1.6.1-1\n\nSource: {source[1] if source else 'Debian'}\n\n"
            text += credits + "\n"
    return text
