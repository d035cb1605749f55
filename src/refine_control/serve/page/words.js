// A caption -> the ids that the model was trained with.

import { Tokenizer } from "./lib/tokenizers.min.mjs";

/** description: the parsed tokenizer.json. Returns caption -> ids with their start and end marks. */
export function makeEncode(description) {
  const words = new Tokenizer(description, {});
  // JavaScript lowers a sigma at a word's end to another letter than the tokenizer that the model was trained with.
  const lowers = JSON.stringify(description.normalizer ?? null).includes('"Lowercase"');
  return (caption) => words.encode(lowers ? caption.replaceAll("Σ", "σ") : caption).ids;
}
