// The part that a poem is: the shape src/shenhong/domains/verse/page.py gives it.

export interface VersePart {
  type: "verse";
  text?: string;
  form: string;
  title: string;
  lines: VerseLine[];
}

export interface VerseLine {
  text: string;
  tones: string; // one mark a character: 平 仄 中 ？
  rhyme: number | null; // index of the rhyming character
  group: string | null; // its group in the 平水韵
  misses?: number[]; // positions that break the pattern of the form
  stop?: string; // the punctuation after the line
}
