// What the server refuses or fails at, for the user to read. In English its own words stand, which say
// the most; in Chinese the common ones are said by their code, else by their status.
import type { ApiError } from "./api";
import { prefs } from "./prefs.svelte";

const zh: Record<string, string> = {
  context_length_exceeded: "内容太长，超出了模型能读的长度；请缩短，或开始新对话",
  too_many_tokens: "“最长回答”超出了服务器的上限；请在设置中改小",
  too_many: "一次要求的太多",
  queue_full: "正在回答的太多，请稍后再试",
  rate_limit_exceeded: "请求太频繁，请稍后再试",
  server_stopping: "服务器正在停止，请稍后再试",
  storage: "服务器读写不了对话；请检查磁盘，然后重启服务器",
  body_too_large: "内容太大，服务器不接受",
  body_too_slow: "内容传得太慢，请重试",
  engine_error: "模型在这个回答上出错了，请重试",
  not_found: "要找的已不在了",
  unknown_field: "其中有此服务器不认识的内容",
  missing_field: "其中缺少必要的内容",
  invalid_value: "其中有不合规定的值",
  host: "服务器不以此地址应答（见 --allow-host）",
  400: "服务器不接受这个请求",
  403: "服务器拒绝了这个请求",
  404: "要找的已不在了",
  408: "等得太久，请重试",
  413: "内容太大，服务器不接受",
  429: "请求太频繁，请稍后再试",
  500: "服务器出错了，日志中有原因",
  503: "服务器暂时不能应答，请稍后再试",
};

export function messageOf({ status, code, message }: ApiError): string {
  return (prefs.language === "zh" && (zh[code ?? ""] ?? zh[status])) || message;
}
