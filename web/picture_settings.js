// The settings inside a picture file: those of this server and of mflux (JSON in EXIF's UserComment), and
// those of AUTOMATIC1111 (a text named "parameters"). Files may be hostile: everything has a limit.

const MOST_FILE_BYTES = 64 * 2 ** 20;
const MOST_TEXT_BYTES = 2 ** 20;
const MOST_PARTS = 10_000;
const MOST_TEXTS = 20; // that may be settings
const MOST_PROMPT_CHARS = 100_000;
const MOST_NAME_CHARS = 200;
const MOST_LORAS = 100;
const KEYWORD = "parameters\0"; // of a text in a PNG
const [UINT16, UINT32] = ["getUint16", "getUint32"];
const EXIF_DIRECTORY = 0x8769;
const USER_COMMENT = 0x9286;
const PREFIX_BYTES = 8; // names the encoding of a UserComment

/**
 * The settings of a file as fields of POST /generate (loras as a list of {name, scale}; the seed as
 * digits), or null if it has none.
 */
export async function settingsOf(file) {
  const bytes = new Uint8Array(await file.slice(0, MOST_FILE_BYTES).arrayBuffer());
  for await (const text of textsOf(bytes)) {
    const settings = ofMflux(text) ?? ofA1111(text);
    if (settings) return settings;
  }
  return null;
}

// The texts of a file

async function* textsOf(bytes) {
  const view = new DataView(bytes.buffer);
  const start = latin(bytes.subarray(0, 12));
  const parts = start.startsWith("PNG\r\n", 1)
    ? chunks(view, 8, false)
    : start.startsWith("RIFF")
      ? chunks(view, 12, true)
      : start.startsWith("\xff\xd8")
        ? segments(view)
        : [];
  let [count, texts] = [0, 0];
  for (const [name, from, to] of parts) {
    if (++count > MOST_PARTS || texts >= MOST_TEXTS) return;
    const part = bytes.subarray(from, to);
    let text = null;
    if (["eXIf", "EXIF", "APP1"].includes(name)) text = userComment(part);
    else if (["tEXt", "iTXt", "zTXt"].includes(name) && latin(part.subarray(0, KEYWORD.length)) === KEYWORD) {
      text = await pngText(name, part.subarray(KEYWORD.length));
    }
    if (text === null) continue;
    texts += 1;
    yield text;
  }
}

/** [name, start, end] of the chunks of a PNG or a WebP. */
function* chunks(view, at, isWebp) {
  while (at + 8 <= view.byteLength) {
    const name = latin(new Uint8Array(view.buffer, isWebp ? at : at + 4, 4));
    const length = view.getUint32(isWebp ? at + 4 : at, isWebp);
    const end = at + 8 + length;
    if (end > view.byteLength) return;
    yield [name, at + 8, end];
    at = end + (isWebp ? length % 2 : 4); // of a PNG: the checksum
  }
}

/** ["APP1", start, end] of the segments of a JPEG that may hold EXIF. */
function* segments(view) {
  let at = 2;
  while (at + 4 <= view.byteLength && view.getUint8(at) === 0xff) {
    const marker = view.getUint8(at + 1);
    const end = at + 2 + view.getUint16(at + 2);
    if (marker === 0xda || end > view.byteLength || end < at + 4) return;
    yield [marker === 0xe1 ? "APP1" : "", at + 4, end];
    at = end;
  }
}

const latin = (bytes) => new TextDecoder("latin1").decode(bytes.subarray(0, MOST_TEXT_BYTES));
const utf8 = (bytes) => new TextDecoder().decode(bytes.subarray(0, MOST_TEXT_BYTES));

/** The text of a chunk. part: what follows its keyword. */
async function pngText(kind, part) {
  if (kind === "tEXt") return latin(part);
  if (kind === "zTXt") return latin(await inflated(part.subarray(1)));
  const language = part.indexOf(0, 2);
  const translated = part.indexOf(0, language + 1);
  const text = part.subarray(translated + 1);
  return utf8(part[0] ? await inflated(text) : text);
}

/** Decompressed bytes, at most MOST_TEXT_BYTES of them. */
async function inflated(bytes) {
  const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const pieces = [];
  let length = 0;
  try {
    while (length < MOST_TEXT_BYTES) {
      const { done, value } = await reader.read();
      if (done) break;
      pieces.push(value);
      length += value.length;
    }
    await reader.cancel();
  } catch {
    // damaged: what there is
  }
  return new Uint8Array(await new Blob(pieces).arrayBuffer());
}

/** The text of EXIF's UserComment, or null. */
function userComment(part) {
  const exif = latin(part.subarray(0, 6)) === "Exif\0\0" ? part.subarray(6) : part;
  const view = new DataView(exif.buffer, exif.byteOffset, exif.byteLength);
  try {
    const little = view.getUint16(0) === 0x4949;
    const read = (kind, at) => view[kind](at, little);
    const entry = (directory, tag) => {
      for (let left = read(UINT16, directory), at = directory + 2; left > 0; left -= 1, at += 12) {
        if (read(UINT16, at) === tag) return at;
      }
      throw new RangeError();
    };
    const inner = read(UINT32, entry(read(UINT32, 4), EXIF_DIRECTORY) + 8);
    const at = entry(inner, USER_COMMENT);
    const [length, from] = [read(UINT32, at + 4), read(UINT32, at + 8)];
    const text = exif.subarray(from + PREFIX_BYTES, from + length);
    if (!latin(exif.subarray(from, from + PREFIX_BYTES)).startsWith("UNICODE")) return utf8(text);
    // The standard leaves the order of the bytes open; most write the one with the zero first.
    return new TextDecoder(text[0] === 0 ? "utf-16be" : "utf-16le").decode(text.subarray(0, MOST_TEXT_BYTES));
  } catch {
    return null; // damaged, or without a comment
  }
}

// Their meaning

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function ofMflux(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    return null;
  }
  if (typeof found?.prompt !== "string" || !isNumber(found.steps ?? 1)) return null;
  const settings = { prompt: shortened(found.prompt) };
  for (const name of ["steps", "guidance", "width", "height", "image_strength"]) {
    if (isNumber(found[name])) settings[name] = found[name];
  }
  for (const name of ["negative_prompt", "model"]) {
    if (typeof found[name] === "string") settings[name] = shortened(found[name]);
  }
  const seed = text.match(/"seed": ?(\d{1,20})\b/); // as text: a number loses digits
  if (seed) settings.seed = seed[1];
  if (Array.isArray(found.lora_paths)) {
    settings.loras = found.lora_paths.slice(0, MOST_LORAS).map((path, index) => ({
      name: loraName(path),
      scale: isNumber(found.lora_scales?.[index]) ? found.lora_scales[index] : 1,
    }));
  }
  return settings;
}

const shortened = (text) => text.slice(0, MOST_PROMPT_CHARS);
const loraName = (path) =>
  String(path).split(/[\\/]/).at(-1).replace(/\.safetensors$/, "").slice(0, MOST_NAME_CHARS);

/** "a fox\nNegative prompt: fog\nSteps: 20, CFG scale: 7, Seed: 1, Size: 512x512" */
function ofA1111(text) {
  const start = text.lastIndexOf("\nSteps: ") + 1;
  if (!/^Steps: \d+,/.test(text.slice(start, start + 20))) return null;
  const values = {};
  for (const [, name, value] of text.slice(start, start + 10_000).matchAll(/([A-Z][\w ]{0,40}): ("[^"]*"|[^,\n]*)/g)) {
    values[name] ??= value;
  }
  const [prompt, negative] = text.slice(0, start).split(/^Negative prompt: ?/m, 2);
  const loras = [];
  const settings = {
    prompt: prompt.replace(/<lora:([^:<>]{1,200}):(-?[\d.]{1,10})[^<>]{0,100}>/g, (_, name, scale) => {
      if (loras.length < MOST_LORAS) loras.push({ name: loraName(name), scale: Number(scale) || 1 });
      return "";
    }).trim().slice(0, MOST_PROMPT_CHARS),
    steps: Number(values.Steps),
  };
  if (negative?.trim()) settings.negative_prompt = shortened(negative.trim());
  if (loras.length) settings.loras = loras;
  if (/^[\d.]+$/.test(values["CFG scale"])) settings.guidance = Number(values["CFG scale"]);
  if (/^\d{1,20}$/.test(values.Seed)) settings.seed = values.Seed;
  if (values.Model) settings.model = values.Model.slice(0, MOST_NAME_CHARS);
  const size = values.Size?.match(/^(\d{1,5})x(\d{1,5})$/);
  if (size) [settings.width, settings.height] = [Number(size[1]), Number(size[2])];
  return settings;
}
