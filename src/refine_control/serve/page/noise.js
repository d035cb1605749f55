// torch.randn of a seed, number for number: Mersenne Twister, 24 bits a number, Box-Muller over eights.
// So a seed draws here what it draws in diffusers; the mirror of runtime.py's noise.

const { fround } = Math;
const TURN = fround(2 * Math.PI);

/** MT19937 (Matsumoto & Nishimura, 1998): a function that returns the next 32 bits. */
export function twister(seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) {
    state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  }
  let place = 624;
  const twist = () => {
    for (let i = 0; i < 624; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    place = 0;
  };
  return () => {
    if (place === 624) twist();
    let y = state[place++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** Turns 16 uniform numbers, in place, into normal ones. Every operation rounds to float32, as torch does. */
function toNormal(sixteen) {
  for (let i = 0; i < 8; i++) {
    const radius = fround(Math.sqrt(fround(-2 * fround(Math.log(fround(1 - sixteen[i]))))));
    const angle = fround(TURN * sixteen[i + 8]);
    sixteen[i] = radius * fround(Math.cos(angle));
    sixteen[i + 8] = radius * fround(Math.sin(angle));
  }
}

/** torch.randn(count, generator=torch.Generator().manual_seed(seed)) for 16 numbers or more: Float32Array. */
export function noise(seed, count) {
  const bits = twister(seed);
  const drawn = new Float32Array(count);
  const uniform = (numbers) => {
    for (let i = 0; i < numbers.length; i++) numbers[i] = (bits() & 0xffffff) / 2 ** 24;
    return numbers;
  };
  uniform(drawn);
  for (let first = 0; first + 16 <= count; first += 16) toNormal(drawn.subarray(first, first + 16));
  if (count % 16) toNormal(uniform(drawn.subarray(count - 16))); // torch redraws the last sixteen
  return drawn;
}
