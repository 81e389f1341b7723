"""Settings of the commands that take a finished SAE further: to Neuronpedia, into a conversation. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from sae.config import ModelDtype, at_least, knob, require
from sae.flags import said


@dataclass(frozen=True)
class UploadConfig:
    """sae_upload: publish features on Neuronpedia. Without --upload everything is checked and nothing is sent."""

    sae_path: str | None = knob(
        None, "a run or a hookpoint folder (default: the newest run in sae_models)", alias=("sae_dir",)
    )
    features: str | None = knob(None, "the features.jsonl (default: the one that sae_viz wrote beside the SAE)")
    dry_run: bool = knob(False, "only check, and show what would be sent; what happens without --upload, too")
    upload: bool = knob(False, "send; the key comes from NEURONPEDIA_API_KEY, or is asked for")
    export: str | None = knob(None, "folder to write Neuronpedia's bulk-import tree into")
    graph_features: str | None = knob(None, "folder to write a json per feature into, for Neuronpedia's graph page")
    model_id: str | None = knob(None, "the model's id there, a new one or an existing one (default: from its name)")
    model_layers: int | None = knob(None, "layers of a model that is new there (default: the model is loaded to see)")
    set_name: str = knob("nanosae", "the source set there; the SAE's source is then 10-nanosae")
    layer: int | None = knob(None, "the SAE's layer (default: the number in its hookpoint)")
    api_base: str = knob("https://www.neuronpedia.org/api", "the API, such as http://localhost:3000/api")
    batch_size: int = knob(128, "features per request")

    def __post_init__(self) -> None:
        require(not (self.upload and self.dry_run), "--upload and --dry_run were both given; choose one")
        require(
            not self.upload or self.model_id is not None,
            "--upload wants --model_id, the id that the model has or shall get on Neuronpedia",
        )
        require(1 <= self.batch_size <= 128, f"batch_size={self.batch_size}; Neuronpedia takes 1 to 128 at a time")
        at_least(self, 0, "layer")
        at_least(self, 1, "model_layers")


@dataclass(frozen=True)
class ChatConfig:
    """chat: talk to a model, see the features on every token, steer them."""

    sae_path: str | None = knob(
        None, "a run, all of whose SAEs take part, or a weights file (default: the newest run in sae_models)",
        alias=("sae_dir",),
    )  # fmt: skip
    model: str | None = knob(
        None, "the language model (default: the one the SAE was trained on)", alias=("checkpoint", "model_name")
    )
    dataset: str | None = knob(None, "where a nanoGPT checkpoint's meta.pkl lies (default: as in training)")
    model_dtype: ModelDtype | None = knob(None, "what the language model computes in (default: as in training)")
    device: str | None = knob(None, "cpu, cuda, cuda:1, mps (default: the best there is)")
    no_sae: bool = knob(False, "the plain model: nothing watched, nothing steered")
    raw: bool = knob(False, "go on with the text instead of answering it (models without a chat do so anyway)")
    seed: int = knob(0, "seed of the answers")
    max_new_tokens: int = knob(128, "tokens in an answer, at most")
    temperature: float = knob(0.8, "how freely tokens are drawn; 0: always the best one")
    top_k: int | None = knob(200, "draw from the best so many tokens, or none for all")
    top_features: int = knob(5, "features shown beside each token")
    steer: tuple[str, ...] = knob((), "edits: 12:+8 adds, 12:=4 sets, 12:*0 scales, 12:|0 projects out, 12:<4 caps")
    stop_when: tuple[str, ...] = knob((), "conditions that end an answer: 45>3")
    prompt: str | None = knob(None, "answer this and end, instead of a conversation")
    json: bool = knob(False, "with --prompt: print one json object, every token with its features")
    explain: str | None = knob(None, "with --prompt: which features pushed the model towards this token")
    web: bool = knob(False, "talk on a page in the browser")
    host: str = knob("127.0.0.1", "address that --web listens on; another lets others in, who need no password")
    port: int = knob(8000, "port that --web listens on; 0 takes a free one")
    max_waiting: int = knob(64, "requests that may wait for an answer; more are told to come back (--web)")

    def __post_init__(self) -> None:
        alone = self.prompt is not None
        require(alone or not (self.json or self.explain is not None), "--json and --explain go with --prompt; give it")
        require(self.prompt != "", "the prompt is empty; write something")
        require(self.explain != "", "the token to explain is empty; give one, such as --explain ' file'")
        require(not (self.web and alone), "--web and --prompt exclude each other; drop one")
        for name in said(self, "host", "port", "max_waiting"):
            require(self.web, f"--{name} goes with --web; give it or drop --{name}")
        at_least(self, 1, "max_new_tokens", "top_k", "top_features", "max_waiting")
        at_least(self, 0, "seed", "temperature", "port")
        require(self.port < 65536, f"port={self.port}; it must be below 65536")
        edits = self.steer or self.stop_when or self.explain is not None
        require(not (self.no_sae and edits), "the plain model has no features to steer or explain with; drop --no_sae")
