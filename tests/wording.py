"""What the message of every error code says: one regular expression for each code.

A message names the cause, the value and the remedy. Tests hold on to codes; a sentence that changes is changed here.
"""

WORDING: dict[str, str] = {
    "adapter-needs-copy": r"the adapter .+ can only be merged into a full copy on disk \(.+\): add --lora-merge-cache",
    "adapter-on-tied-head": r"the adapter .+ adapts .+, which its base ties to the embeddings: .+ without this adapter",
    "adapter-without-base": r".+ is an adapter without its base: write `.+\+.+`",
    "alphas-of-another-merge": r"the alphas file .+ is for another merge \(other .+\): calibrate again, or correct",
    "benchmark-failed": r"lm_eval ended with exit code -?\d+ \(.+\): read what it printed, then run the same command",
    "cannot-join-processes": r"the processes cannot be joined \(.+\): start them with torchrun",
    "cannot-merge-adapter": r"mergekit cannot merge the adapter .+ into a copy \(.*\): merge it with peft first"
    r"|the change of the adapter .+ is not in the weights and cannot be merged: leave it out",
    "cannot-plan": r"mergekit cannot plan this merge \(.*\): correct the recipe, or try a newer mergekit",
    "cannot-write": r"cannot (write|keep) .+(choose (a|another) folder|free some room)",
    "conflicting-keys": r"(the prompts of .+ end with their answer, .+: leave it out of `text`, .+"
    r"|(--verify|`\w+`).+(: drop `completion`, or set `text`|: drop --verify|; set `steps: 0`"
    r"|; drop `(ridge|evaluate)`|: choose one of .+, or another objective|: drop `\w+`|: drop `alphas`, and they)"
    r"|.+ has `role: direction`, and .+: (drop `\w+`|leave the model out, or change `objective`)"
    r"|.+ has (a )?`(hint|dataset: self)`,? .+: (drop|set|name) "
    r"|no expert of the recipe writes rows: set `dataset: self`"
    r"|.+ has `\w+`.*, and no `dataset` for .+: name it, or drop `)",
    "corrupt-adapter": r".+(: fetch the adapter again|: is .+ an adapter\?)",
    "corrupt-checkpoint": r".+ of .+ (is missing or corrupt \(.*\)|lacks .+, which its index promises"
    r"|holds .+, (which its index does not list|and so does .+)); fetch it again",
    "damaged-file": r"(is damaged at .* \(.+\): name the file that|do not fit together; calibrate again"
    r"|contradicts itself at .+: run `mergekit-slta linearity` again)",
    "damaged-layout": r"layout is damaged, or was made by an earlier version \(.*\): calibrate again",
    "dataset-not-found": r"dataset .+ not found: there is no such file or folder \(paths start at the current folder",
    "differing-architectures": r".+ is a \w+, the base a \w+: all models of a merge need the same architecture",
    "differing-sizes": r".+ (has \w+ .+, the base|is \[.*\] in .+ and) .+: (the experts must be fine-tuned from this"
    r" very base|all models of a merge need the same shapes|weights and config are of different models, fetch both)",
    "differing-vocabularies": r"(the adapter .+ is for \d+ tokens.*, and its base has \d+: merge it with peft first|"
    r"the vocabularies differ: add `tokenizer: \{source: base(, pad_to_multiple_of: \d+)?\}`)",
    "disk-full": r"(needs .+ GiB.* and its disk has .+ GiB left: free some|cannot write .+; choose a folder that is "
    r"writable and has room|cannot keep .+ GiB of features in .+: free some room)",
    "duplicate-model": r"(is listed twice; list each expert once"
    r"|--(importance|data) names .+ twice: give it one (weight|dataset)"
    r"|a model is named .+, as the direction is: give its folder another name)",
    "file-too-large": r".+ is larger than \d+ MiB, hence no .+: name the file that",
    "foreign-file": r"(holds files that no demo wrote: choose a new or empty folder"
    r"|is no .+ and is not overwritten: (name another (file|folder)|choose another folder|put the model card)"
    r"|holds the alphas of other models \(.+\) and is not overwritten: name another file with -o, or remove it"
    r"|holds the comparison of other models \(.+\) and is not overwritten: name another folder with -o, or remove it"
    r"|.+ was edited since its expert wrote it: name it as `dataset` to use it, or remove it"
    r"|is no file that an expert wrote, .+, and is not overwritten: name it as `dataset`, or choose another folder"
    r"|(holds the weights of a calibration|is there already) and is not overwritten: name another file with -o, or "
    r"give --overwrite)",
    "foreign-weights": r"(holds weights that no merge of this package wrote \(.+\): name another folder, or replace "
    r"them with `mergekit-slta merge --overwrite`|somebody put other weights into .+: move them away and merge again)",
    "git-lfs-pointer": r".+ of .+ is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder",
    "hub-unreachable": r"there is no model folder .+ \(paths start .+\),.+ cache does not hold such a model completely"
    r"(, and the Hub cannot be reached at .+|): check the path, (the network, or HF_ENDPOINT|or unset HF_HUB_OFFLINE)",
    "in-use": r"another (merge|process) \(.+\) (is writing to|works on|writes) .+: wait for it, or (name|write) ",
    "incomplete-statistics": r"the statistics lack .+: calibrate again",
    "interrupted-run": r"^Interrupted: .+; run the same command again",
    "invalid-template": r"(`(text|completion)` is not a template \(.+\): .+; write \{(\{ for a brace|.+\} for a column)"
    r"|`(text|completion)` is a template over .+, which holds messages: write `text: .+`, without braces"
    r"|`chat_template` is not a template \(.+\): .+; correct it, or set another"
    r"|`chat_template` of .+ is not a template that can be cut .+ \(.+\), .+: set another, or name a `dataset`"
    r"|the chat template leaves out part of .+ \(.+\): set another `chat_template`, or name a `dataset`)",
    "invalid-value": r"(`\w+`|--[\w-]+) .+(choose one of|give (a|1)|must be a|should (be|have)|use at least"
    r"|: write `auto`|: name a model and)",
    "key-of-another-objective": r"`\w+` only applies to `objective: .+`, .+: drop `\w+`, or change `objective`",
    "lost-process": r"process \d+ of \d+ has lost another one .+: see that one's message, then run the same command",
    "merge-failed": r"(the merge failed \(\w+\): .*|mergekit-yaml ended with exit code .+ \(.*\): .+); -v shows where",
    "misplaced-key": r"(`.+` stands .+, where it is ignored: move it|is shared by all models: move it"
    r"|is the base and is listed with `parameters`: list the expert that you meant, or drop)",
    "missing-adapter": r"the adapter .+ has no .+: check the path or Hub id",
    "missing-alphas": r"without its pre-pass and without `alphas`: run `mergekit-yaml` .+ or name an existing alphas",
    "missing-base": r"(needs the model that the experts were fine-tuned from: add `base_model:`"
    r"|the base is not clear: .+; name the base first, or with --base)",
    "missing-chat-template": r"(.+ has no chat template to write rows from: give it a `hint`, .+, or name a `dataset`"
    r"|has a chat template for the column `.+`: set `chat_template`, or choose another column"
    r"|`chat_template` of .+ is .+, and there is no such chat template .+: set another, or choose a column)",
    "missing-column": r"(the columns of .+, .*, hold none of what is found without `text`.*: set `text` (to|and)"
    r"|the columns of .+ hold none of what is found without `text`: run this on a terminal without --yes, .+, or give"
    r"|has no column `text` that `completion` could follow: set `text`"
    r"|`(text|completion)` names '.*', but .+ has the columns .+)",
    "missing-dataset": r"(.+ has no `dataset`: name its calibration rows, or an existing file with `alphas`"
    r"(; with `dataset: self` it writes them itself)?"
    r"|.+ has no `dataset`: name rows, on which merges are compared"
    r"|.+ has no `dataset` that is written yet: write its rows with `mergekit-slta rows`, and name the file"
    r"|no rows are known for .+: add --data .+=FILE_OR_ID)",
    "missing-expert": r"(at least one expert besides the base: add it|leaves out all of .+: keep one of them"
    r"|combines experts, and there is one: add another, or (set `direction: none`|change `objective`))",
    "missing-file": r"there is no (alphas|linearity|statistics) file .+: name the file that `mergekit-slta \w+` wrote",
    "missing-mergekit": r"mergekit is not installed: pip install 'mergekit>=",
    "missing-model": r"(there is no model folder .+ \(paths start at .+\).*: check (the path|`[\w.]+`, which names)"
    r"|.+ has no revision .+ on the Hub: choose one of those at"
    r"|mergekit reads `@` and `\+` in .+ as a revision and an adapter: rename the folder)",
    "missing-package": r".+ is not installed: run `pip install .+`",
    "missing-tensor": r".+ (lacks the tensor|is missing in) .+: (all models of a merge need the same tensors"
    r"|fetch the model again, or (set `tie_word_embeddings: true`|correct its config\.json))",
    "missing-token": r"`tokenizer.tokens` takes .+ from .+ of .+, which has no such token: name another model or token",
    "missing-value": r"(`.+` in .+ has no value: give it one, or remove the line"
    r"|`tokenizer.tokens` has no `source` for .+: name one of .+)",
    "model-and-adapter": r".+ holds a model \(.+\) and an adapter \(.+\), .+: write `.+\+.+` for both, or move the",
    "name-taken": r"the name \w+ is already registered with mergekit .+ by .+: uninstall one of the two",
    "needs-calibration": r"(with `\w+: .+` the statistics themselves depend on `.+`: change the recipe and calibrate"
    r"|`direction: .+` is computed from all experts: leave it out, too .+, or calibrate without the expert)",
    "no-access": r"(.+ is gated: ask for access at .+, then log in with `hf auth login` or set HF_TOKEN"
    r"|the Hub refuses to give .+: HF_TOKEN has expired or lacks the right to read .+; make a new one)",
    "no-answers": r"(all \d+ rows of .+ end before their answer begins: raise `max_seq_length`, or choose shorter rows"
    r"|.+ cannot write rows of `max_seq_length` = \d+ tokens: its template and hint take \d+ of them; raise it)",
    "not-a-folder": r"(.+ is not a folder: choose a new or empty one"
    r"|.+ is a (file|link to nothing)[:;] name (a|another) folder"
    r"|.+ is no folder, and the merge has one there: move it away and merge again)",
    "not-a-plain-file": r"(is no plain file: (name another|choose another|put the model card)"
    r"|is a folder where the merge has a file: move it away and merge again)",
    "not-a-recipe": r"(the recipe.* is not a merge recipe \(.*\): correct it|the recipe is of type .+: give the path"
    r" of a recipe|: put each recipe into a file of its own"
    r"|the recipe.* is (empty|not a mapping of keys to values): it starts with `merge_method:"
    r"|the recipe.* has no `merge_method`: add `merge_method:)",
    "not-expressible": r"(: where the checkpoints are .+ already, use `out_dtype` in place of `dtype`"
    r"|which a filter cannot express: export alphas of|this file cannot be exported, merge with `mergekit-slta merge`)",
    "not-finite": r"features .*behind .+ hold NaN or Inf.*: use `compute_dtype: float32`, or",
    "not-finite-weights": r".+ of .+ holds NaN or Inf: fetch that checkpoint again, or leave the model out",
    "not-yaml": r"(the recipe .+ is not valid YAML \(.+\): correct that line"
    r"|the front matter of .+ is no valid YAML \(.+\): mend it, then run this again)",
    "nothing-to-draw": r"(nothing to draw: .+; calibrate again|holds neither .+ nor .+: name a merged model's folder)",
    "old-mergekit": r"needs mergekit .+ or newer, but .+ is installed: pip install -U 'mergekit>=",
    "one-process-only": r"`\w+` runs in one process: start it without torchrun",
    "other-base": r"(the adapter|the adapter's product) .+: the adapter belongs to another base",
    "other-file-version": r"(is an? .+ of version .+, this release reads version \d+: run `mergekit-slta \w+` again"
    r"|was made by another version of this package: calibrate again)",
    "other-method": r"merge_method is '.*', and this command runs '\w+' recipes only: use `mergekit-yaml` for others",
    "other-tensors": r"mergekit wrote other tensors than planned \(.+\): please report the model",
    "out-of-memory": r"out of memory on .+ \(.*\): lower `\w+` \(\d+\) .*or choose another --device",
    "output-is-an-input": r"(is one of the models to merge: name another folder|is an input of this command: name)",
    "output-needed": r"the merge has the direction .+, which is written as a checkpoint .+: name the recipe with -o",
    "path-in-the-way": r".+ is in the way of unfinished work: move it",
    "plan-does-not-fit": r"mergekit's own definition of this model class does not list the tensors .+; merge with",
    "processes-differ": r"process \d+ sees other models or data than the first one: give all the same files and",
    "quantized-weights": r".+ of .+ holds quantized weights \(.+ in \w+.*\): dequantize first \(.+\), or name the",
    "recipe-needed": r"these alphas are for a merge with a `tokenizer` section: name its recipe with --recipe",
    "recipe-of-other-alphas": r".+ is not the recipe of these alphas, .+: name theirs with --recipe",
    "reserved-name": r"the alphas cannot be called .+: name it .+, or choose another folder",
    "several-files": r"the folder .+ holds several \w+ files: name one of .+",
    "split-token": r"the chat template for .+ writes .+, which the merged model's tokenizer splits into \d+ tokens: "
    r"(add `tokenizer:|set `chat_template|choose another)",
    "stale-copy": r"the merged copy .+ of .+ (is not whole|is older than .+): remove it, and it is made again",
    "token-out-of-range": r"token \d+.* is beyond the \d+ rows of .+: (use the tokenizer that belongs to these"
    r"|use a tokenizer without gaps|take `source: union`|name another `token_id`)",
    "too-few-rows": r"(has no rows: choose another `dataset` or `split`"
    r"|leaves \d+ rows to compare merges on, and \d+ are needed: give 20 or more different rows per task"
    r"|.+ has written \d+ rows, and \d+ of them can be used, .+\(.+\): give it a `hint`, name a `dataset`, or lower)",
    "uncalibrated-tensors": r"text does not run through .+: add `uncalibrated: base`",
    "uncovered-tensor": r"the alphas file .+ does not cover the tensor .+: calibrate again",
    "unexpected-error": r"\w+: .*",
    "unknown-blocks": r"(blocks of .+ cannot be told apart, or do not add up to the layer: use `granularity: layer`"
    r"|is used without being called: use `granularity: attn_mlp`), and please report the model",
    "unknown-file-type": r"dataset .+ has (file type .+; use one of .+, a folder, or a Hub id"
    r"|files of several types, .+: name those of one)",
    "unknown-key": r"unknown key `.*` .+: (did you mean|known keys|it belongs to .+: remove it)",
    "unknown-layers": r"no list of \d+ decoder layers found in .+; please report the model",
    "unknown-model": r"(.+ (names several|is none of the) models?: name one of"
    r"|the alphas file .+ knows no model .+; it is for .+: calibrate again)",
    "unknown-objective": r"the objective is .*, and this release knows .+: calibrate again",
    "unknown-submodule": r".+ is none of the submodules: there is .+",
    "unknown-tensor": r"tensor .+ belongs to no submodule that is known here; please report the model",
    "unreadable-checkpoint": r"cannot open the checkpoint of .+ \(.*\): (a file is missing or corrupt, fetch it again"
    r"|check the path or Hub id|fetch (its weights|the index)|load it with transformers|name the folder)",
    "unreadable-config": r"(cannot read the config of .+: .+; check the path or Hub id"
    r"|transformers makes no model from the config of .+ \(.*\): correct its config\.json)",
    "unreadable-dataset": r"(cannot load dataset .+ \(config .*, split .*\): .+; (mend the file, name another, or )?"
    r"(check `dataset`, `dataset_config` and|scripts are not run: name files|correct `split`|drop `dataset_config`)"
    r"|cannot read dataset .+; (save|mend) the file|cannot load dataset .+ has other columns than .+; name one of them"
    r"|is the folder of a model: name a file or folder of rows)",
    "unreadable-file": r"(cannot read the (alphas|linearity) file .+ \(.*\): name the file that"
    r"|cannot read statistics from .+ \(.*\): name the file that .+, or calibrate again)",
    "unreadable-recipe": r"(cannot read the recipe .+ \(.*\): check its path|is not a UTF-8 text file: save it as one)",
    "unreadable-tokenizer": r"cannot load the tokenizer of .+: .+; the base needs one, to read the calibration rows",
    "unsolvable-statistics": r"the statistics cannot be solved \(.*\): calibrate again",
    "unsupported-architecture": r".+ is a \w+, which cannot be merged here: (it|its) .+",
    "unsupported-format": r"cannot draw .+: figures are \.png or \.svg",
    "unsupported-layout": r"merges whole models: replace `\w+:` by `models:`",
    "unusable-device": r"(--multi-gpu needs an accelerator, .+: drop it|`compute_dtype` is tf32, and .+: use auto"
    r"|device .+ cannot be used here .*: drop --cuda)",
    "unusable-row": r"row \d+ of .+(: mend the row|: remove such rows or choose another `text`"
    r"|save (it|the file) as UTF-8)",
    "value-differs-between-tensors": r"`\w+` differs between tensors .+: give one value for all of them",
    "wrong-file-type": r"is not an? (alphas|linearity|statistics) file: name the ",
}  # fmt: skip
