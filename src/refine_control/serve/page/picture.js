// A file -> the RGBA bytes of its middle square at the model's resolution; or a Fault that says why not.

import { Fault } from "./files.js";

const MOST_BYTES = 50e6;
const MOST_PIXELS = 64e6;
const KINDS = "PNG, JPEG, WebP, GIF, BMP or AVIF";

/** Kinds of pixels, by their first bytes: names and types of files lie, and an SVG is a program. */
const RASTER = [/^\x89PNG\r\n\x1a\n/, /^\xff\xd8\xff/, /^GIF8/, /^RIFF[^]{4}WEBP/, /^BM/, /^[^]{4}ftypavi[fs]/];

/**
 * Pixels of a picture that already has the model's size come through exactly. Transparency is laid over white.
 *
 * @param blob a file, or what was pasted
 * @returns Uint8ClampedArray (side * side * 4), opaque
 */
export async function readPicture(blob, side, name = "this picture") {
  if (blob.size > MOST_BYTES) throw new Fault(`${name} has ${megabytes(blob.size)} MB, more than ${megabytes(MOST_BYTES)}.`);
  const head = String.fromCharCode(...new Uint8Array(await blob.slice(0, 16).arrayBuffer()));
  if (!RASTER.some((kind) => kind.test(head))) throw new Fault(`${name} is no ${KINDS} file, and this page reads no other.`);
  await refuseHuge(blob, name);
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" }).catch(() => {
    throw new Fault(`${name} cannot be decoded. Is the file whole?`);
  });
  try {
    return shrink(bitmap, side);
  } finally {
    bitmap.close();
  }
}

/** The size is read from the header, before anything large is decoded. */
async function refuseHuge(blob, name) {
  const image = new Image();
  const address = URL.createObjectURL(blob);
  try {
    await new Promise((resolve, reject) => Object.assign(image, { onload: resolve, onerror: reject, src: address }));
  } catch {
    throw new Fault(`${name} cannot be decoded. Is the file whole?`);
  } finally {
    URL.revokeObjectURL(address);
  }
  const { naturalWidth: width, naturalHeight: height } = image;
  if (width * height > MOST_PIXELS) {
    throw new Fault(`${name} is ${width}×${height}, more than ${MOST_PIXELS / 1e6} million pixels. Make it smaller first.`);
  }
}

/** The middle square, halved until one smooth step is left: a browser's single step skips pixels when it shrinks a lot. */
function shrink(bitmap, side) {
  let source = bitmap;
  let least = Math.min(bitmap.width, bitmap.height);
  let [left, top] = [(bitmap.width - least) / 2, (bitmap.height - least) / 2];
  for (;;) {
    const size = Math.max(side, Math.ceil(least / 2));
    const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.fillStyle = "white";
    pen.fillRect(0, 0, size, size);
    pen.imageSmoothingEnabled = least !== size;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(source, left, top, least, least, 0, 0, size, size);
    if (size === side) return pen.getImageData(0, 0, side, side).data;
    [source, least, left, top] = [canvas, size, 0, 0];
  }
}

const megabytes = (bytes) => Math.round(bytes / 1e6);

/** Draws RGBA bytes on a canvas, one canvas pixel for each. */
export function show(canvas, pixels, side) {
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels), side, side), 0, 0);
}
